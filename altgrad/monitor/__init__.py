"""Which steps, layers and elements are observed, and what is kept from step to step."""
