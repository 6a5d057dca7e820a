import threading
import time

from lte_lightning.store import hold_folder


def test_one_at_a_time(tmp_path):
    seen = []

    def work(name):
        with hold_folder(tmp_path):
            seen.append(name)
            time.sleep(0.01)
            seen.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen[::2]) == [0, 1, 2, 3]
    assert seen[::2] == seen[1::2]  # whoever came in went out before the next
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_for_others_to_refuse(tmp_path):
    with hold_folder(tmp_path / "nowhere"):
        assert not (tmp_path / "nowhere").exists()
