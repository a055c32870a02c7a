output "bucket" {
  description = "Use as s3://<bucket>/dvc, s3://<bucket>/mlflow and s3://<bucket>/state."
  value       = aws_s3_bucket.pipeline.bucket
}

output "role_arn" {
  description = "Annotate the service accounts: eks.amazonaws.com/role-arn."
  value       = aws_iam_role.pipeline.arn
}
