"""S3 files and folders, and packed datasets."""
