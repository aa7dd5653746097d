// Questions about Python's own objects, of which Python asks a hundred before every chain of a user's module.
#include <algorithm>

#include "bindings_records.h"

namespace jlebm {
namespace {

// The expected objects, one after another: by address alone, nothing is asked of any of them.
class Expected {
public:
    explicit Expected(py::handle entries) : entries_(entries), left_(entries_.size()) {}

    bool next(PyObject* found) { return left_ > 0 && (--left_, entries_.next().ptr() == found); }
    bool none_left() const { return left_ == 0; }

private:
    Fields entries_;
    size_t left_;
};

bool same_items(PyObject* dict, size_t most, Expected& expected) {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (most-- > 0 && PyDict_Next(dict, &position, &key, &value))
        if (!expected.next(key) || !expected.next(value)) return false;
    return true;
}

bool same_elements(PyObject* list, size_t most, Expected& expected) {
    const size_t n = std::min(size_t(PyList_GET_SIZE(list)), most);
    for (size_t i = 0; i < n; ++i)
        if (!expected.next(PyList_GET_ITEM(list, Py_ssize_t(i)))) return false;
    return true;
}

// Whether dicts, lists and objects hold, in their order, the very objects of `entries`: keys and values, or elements,
// at most so many of each holder, and behind them the holder itself.
bool same_entries(py::handle holders, py::handle entries, size_t most) {
    Expected expected(entries);
    Fields all(holders);
    for (size_t left = all.size(); left > 0; --left) {
        PyObject* const holder = all.next().ptr();
        if (PyDict_Check(holder)) {
            if (!same_items(holder, most, expected)) return false;
        } else if (PyList_Check(holder)) {
            if (!same_elements(holder, most, expected)) return false;
        } else {
            const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(holder, nullptr));
            if (!attributes) {
                PyErr_Clear();
                return false;
            }
            if (!same_items(attributes.ptr(), most, expected)) return false;
        }
        if (!expected.next(holder)) return false;
    }
    return expected.none_left();
}

} // namespace

void bind_objects(py::module_& m) {
    m.def("same_entries", &same_entries, py::arg("holders"), py::arg("entries"), py::arg("most"),
          "whether dicts, lists and objects still hold the very objects of `entries`");
}

} // namespace jlebm
