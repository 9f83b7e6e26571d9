"""What a run tells of itself: metrics, trackers, sizes, time."""
