"""Gradients at the optimizer of accelerate's loops are those of the whole batch."""


from integrations import accelerate_cases as cases

EXACT = 1e-12
WRONG = 0.1


def test_every_window_has_whole_batch_gradient():
    found = cases.run_loop({"gradient_accumulation_steps": cases.STEPS}, exact=True)
    assert max(found) <= EXACT


def test_stock_accelerator_is_wrong_on_this_data():
    found = cases.run_loop({"gradient_accumulation_steps": cases.STEPS}, exact=False)
    print(found)
    assert min(found) >= WRONG
