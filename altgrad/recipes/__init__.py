"""How weights and optimizer states are stored."""
