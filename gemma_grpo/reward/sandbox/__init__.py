"""Python that a model wrote, run where it can do no harm: cell.py is the inside, running.py the outside, unit_tests.py the reward."""
