"""Where a network that is trained from scratch begins.

What enters: a new network. What leaves: the same, other weights in its attention. It must not know data.
"""

import torch
from torch import nn

from cvt_model.model import CvtForImageClassification, CvtModel, SelfAttention

SELF_LOGIT = 1.5


@torch.no_grad()
def attend_to_self(model: CvtModel | CvtForImageClassification, logit: float = SELF_LOGIT) -> None:
    """Begin with queries and keys that are alike, so that every token attends most to those like itself.

    As the authors initialise it, attention begins as an average over the whole image, and locality has to
    be learnt, which small data sets teach slowly. After the mimetic initialisation of Trockman and Kolter
    (arXiv 2305.09828), which gives the product of both projections a diagonal. Here both are one
    orthogonal matrix, and so are the convolutions before them; `logit` is about what a token has for
    itself, before the softmax.
    """
    for module in model.modules():
        if not isinstance(module, SelfAttention):
            continue
        query, key = module.projection_query.weight, module.projection_key.weight
        width = query.shape[0]
        # Normalised tokens have a squared norm of about `width`, of which each head sees its share.
        gain = (logit * module.num_heads / (width * module.scale)) ** 0.5
        alike = nn.init.orthogonal_(torch.empty_like(query), gain=gain)
        query.copy_(alike)
        key.copy_(alike)
        convolution = module.convolution_projection_query.state_dict()
        if convolution.keys() == module.convolution_projection_key.state_dict().keys():
            module.convolution_projection_key.load_state_dict(convolution)
