"""How a loss uses its parameters, and what its backward pass reveals."""
