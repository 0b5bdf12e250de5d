"""What a server reports of itself: metrics, traces, statistics."""
