"""What a team deploys: the local stack, containers, Kubernetes, cloud resources."""
