"""How weights and optimizer states are stored: `storage` keeps weights on the grid of a format."""
