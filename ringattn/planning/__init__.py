"""What each rank computes, sends and holds, in integers: plans, schedules, programs, costs. No torch here."""
