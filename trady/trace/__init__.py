"""One forward pass on shapes alone: its calls, its values, who reads them."""
