"""Where each expert's copies lie and how its tokens are split over them: plans, planners, splits. No model needed."""
