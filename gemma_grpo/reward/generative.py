"""The generative reward: log-odds that Gemma answers "Yes" to "is this a good reply?"."""

JUDGE_QUESTION = "Is this a good reply? Good replies are correct, helpful, harmless and brief. Answer Yes or No."
