"""Reward: how near the last guess is, and a tenth less for each guess before it."""

from environment import last_number


def compute_score(data_source, solution_str, ground_truth, extra_info, environment):
    guess = last_number(solution_str)
    if guess is None:
        return {"score": 0.0, "acc": 0.0}
    distance = abs(guess - int(ground_truth))
    earlier = max(0, environment.get("guesses", 0) - 1)  # a turn that was cut off is no guess
    return {"score": max(0.0, 1 - distance / 20) * 0.9**earlier, "acc": float(distance == 0)}
