"""Base classes and update rules that several families share."""
