"""Class lists under the import path of the public package."""
