"""Champion against challenger: scores on the test set, the decision, the verdict."""
