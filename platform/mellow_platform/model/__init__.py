"""The Mellow model in Hugging Face shape; importing this registers its Auto classes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

from .configuration_mellow import HTSATConfig, MellowConfig, encoder_config
from .feature_extraction_mellow import MellowFeatureExtractor
from .modeling_mellow import HTSATEncoder, HTSATOutput, MellowForConditionalGeneration
from .processing_mellow import MellowProcessor, pad_labels

AutoConfig.register("mellow_htsat", HTSATConfig)
AutoConfig.register("mellow", MellowConfig)
AutoModel.register(HTSATConfig, HTSATEncoder)
AutoModel.register(MellowConfig, MellowForConditionalGeneration)
AutoFeatureExtractor.register(MellowConfig, MellowFeatureExtractor)
AutoProcessor.register(MellowConfig, MellowProcessor)

__all__ = [
    "HTSATConfig",
    "HTSATEncoder",
    "HTSATOutput",
    "MellowConfig",
    "MellowFeatureExtractor",
    "MellowForConditionalGeneration",
    "MellowProcessor",
    "encoder_config",
    "pad_labels",
]
