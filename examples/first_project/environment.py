"""Environment: answers each guess with higher or lower, until the number is found."""

import re


def last_number(text):
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None


class Guess:
    def reset(self, row, seed):
        self._secret, self.guesses = int(row["ground_truth"]), 0

    def step(self, text):
        self.guesses += 1
        guess = last_number(text)
        if guess == self._secret:
            return None, None, True  # observation, reward, done
        if guess is None:
            return "Answer with one number.", None, False
        return "Higher." if guess < self._secret else "Lower.", None, False
