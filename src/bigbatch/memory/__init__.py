"""How much memory a micro-batch takes: measured, predicted without running it, and chosen to fit.

usage       what there is, what this process has used so far, and whether it ran out
tracker     every allocation of a stretch of code, with or without data behind the tensors
prediction  the peak of a training step, from one forward and backward without data
probe       the time and the peak of a real micro-batch, gradients thrown away
timing      the time of a micro-batch by its size
step        what is trained, and the micro-batches that its batch can bring
search      the largest size that fits
choice      the micro-batch that is fastest in the memory that is there
"""

from bigbatch.memory.choice import Choice as Choice
from bigbatch.memory.choice import Step as Step
from bigbatch.memory.choice import choose as choose
from bigbatch.memory.prediction import Prediction as Prediction
from bigbatch.memory.prediction import PredictionError as PredictionError
from bigbatch.memory.prediction import Rehearsal as Rehearsal
from bigbatch.memory.tracker import Part as Part
from bigbatch.memory.tracker import Tracker as Tracker
from bigbatch.memory.usage import Room as Room
from bigbatch.memory.usage import find_room as find_room
from bigbatch.memory.usage import is_out_of_memory as is_out_of_memory
from bigbatch.memory.usage import peak_bytes as peak_bytes
from bigbatch.memory.usage import release_memory as release_memory
