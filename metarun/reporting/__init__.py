"""Tables of results, and the HTML report."""
