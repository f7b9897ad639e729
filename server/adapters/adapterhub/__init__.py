"""The methods of AdapterHub's checkpoints: one config may hold several."""
