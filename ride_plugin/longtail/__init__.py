"""What long-tailed recognition uses beside RIDE: losses, samplers, subsets, reports."""
