"""The Mellow model in Hugging Face shape; importing this registers its Auto classes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor

from .configuration_mellow import MellowConfig, encoder_config
from .encoders import (
    ENCODERS,
    MELLOW,
    AudioEncoderOutput,
    HTSATConfig,
    HTSATEncoder,
    encoder_digest,
    holds_model,
    load_encoder,
    load_encoder_config,
)
from .feature_extraction_mellow import MellowFeatureExtractor
from .loss import pad_labels
from .modeling_mellow import MellowForConditionalGeneration
from .processing_mellow import MellowProcessor
from .projections import PROJECTIONS

for _config, _encoder in ENCODERS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _encoder)
AutoConfig.register(MELLOW, MellowConfig)
AutoModel.register(MellowConfig, MellowForConditionalGeneration)
AutoFeatureExtractor.register(MellowConfig, MellowFeatureExtractor)
AutoProcessor.register(MellowConfig, MellowProcessor)

__all__ = [
    "ENCODERS",
    "PROJECTIONS",
    "AudioEncoderOutput",
    "HTSATConfig",
    "HTSATEncoder",
    "MellowConfig",
    "MellowFeatureExtractor",
    "MellowForConditionalGeneration",
    "MellowProcessor",
    "encoder_config",
    "encoder_digest",
    "holds_model",
    "load_encoder",
    "load_encoder_config",
    "pad_labels",
]
