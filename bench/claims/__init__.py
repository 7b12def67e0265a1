"""The claim put to the test: Semi-Siamese against conventional training, with equal care for both. docs/claim.md has the results."""
