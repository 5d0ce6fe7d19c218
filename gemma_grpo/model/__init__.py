"""The frozen base and what is computed with it."""

import logging

# where it is installed, peft imports bitsandbytes, which tells every user on a CPU that an optional kernel of the Hub is missing
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
