__version__ = "0.1.0"

# the one file of the library that no notebook writes
import warnings
warnings.filterwarnings("ignore", message=".*torch.jit.script.*is deprecated", category=FutureWarning)   # said by fastai's import to its developers, not to users of this package
