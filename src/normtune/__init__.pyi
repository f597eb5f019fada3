from normtune.adapters.mixing import mix_adapters as mix_adapters
from normtune.adapters.storage import save_adapter as save_adapter
from normtune.api.models import adapt as adapt
from normtune.api.models import export_peft as export_peft
from normtune.api.models import load as load
from normtune.api.models import load_adapter as load_adapter
from normtune.api.models import merge as merge
from normtune.api.questions import ask as ask
from normtune.api.questions import describe as describe
from normtune.api.runs import advise as advise
from normtune.api.runs import evaluate as evaluate
from normtune.api.runs import study as study
from normtune.api.runs import train as train
from normtune.data.records import Dataset as Dataset
from normtune.data.records import Example as Example
from normtune.data.registry import open_dataset as open_dataset
from normtune.errors import InputError as InputError
from normtune.evaluation.compare import compare as compare
from normtune.evaluation.config import EvaluateConfig as EvaluateConfig
from normtune.evaluation.results import read_evaluation as read_evaluation
from normtune.methods.adapt import TunedModel as TunedModel
from normtune.methods.adapt import restore_base as restore_base
from normtune.methods.recipe import parse as parse
from normtune.metrics.answers import score_vqa as score_vqa
from normtune.training.config import TrainConfig as TrainConfig

__version__: str
__all__: list[str]
