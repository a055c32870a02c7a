variable "region" {
  description = "AWS region of the bucket."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket for DVC, MLflow artifacts and resume state."
  type        = string
}

variable "role" {
  description = "Name of the role that the worker and the jobs assume."
  type        = string
  default     = "rfdetr-pipeline"
}

variable "namespace" {
  description = "Kubernetes namespace of the service accounts."
  type        = string
  default     = "rfdetr"
}

variable "service_accounts" {
  description = "Service accounts that may assume the role."
  type        = list(string)
  default     = ["rfdetr-worker", "rfdetr-job"]
}

variable "oidc_provider_arn" {
  description = "ARN of the cluster's OIDC provider."
  type        = string
}

variable "oidc_issuer" {
  description = "Issuer of the OIDC provider, without https://."
  type        = string
}

variable "state_days" {
  description = "Days after which resume state is deleted."
  type        = number
  default     = 30
}
