"""One page that says what a model reached, under which settings, and how that compares with the published table."""
