from methods.scl import expected as supcon


def expected(step):
    losses = supcon(step)
    if step.num_done < round(step.criterion.contrast_only * step.num_updates):
        losses['loss'] = losses['contrast_loss']
    return losses
