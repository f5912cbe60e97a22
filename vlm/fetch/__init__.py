"""Sources that lie elsewhere, brought to where the workflow reads them."""
