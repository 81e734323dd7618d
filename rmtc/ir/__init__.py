"""The compiler's data: programs, loops, schedules, bodies and kernels, each with a printed form."""
