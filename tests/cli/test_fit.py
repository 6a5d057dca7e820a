def test_x(tiny, lightning, tmp_path):
    o = lightning(tmp_path, tiny.config(epochs=(2, 2, 2)), "fit")
    print(o.out)
    print(o.err)
    assert o.code == 0
    print(o.written.read_text())
