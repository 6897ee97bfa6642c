from methods import clean_cross_entropy


def half_square(values):
    return sum(x * x for x in values) / 2


def expected(step):
    task_loss = clean_cross_entropy(step)
    distance_loss = head_loss = 0.0
    for name, p in step.model.named_parameters():
        now, before = p.flatten().tolist(), step.pretrained[name].flatten().tolist()
        if not name.startswith('head.'):
            distance_loss += half_square([a - b for a, b in zip(now, before, strict=True)])
        elif name == 'head.weight':
            head_loss += half_square(now)
    loss = task_loss + step.criterion.weight * distance_loss + step.criterion.head_weight * head_loss
    return {'loss': loss, 'task_loss': task_loss, 'distance_loss': distance_loss, 'head_loss': head_loss}
