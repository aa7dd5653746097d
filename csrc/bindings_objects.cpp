// Questions about Python's own objects, of which Python asks hundreds before every chain of a user's module.
#include "bindings_tensors.h"

namespace jlebm {
namespace {

py::object new_reference(PyObject* object) { return py::reinterpret_steal<py::object>(object); }

// what a weak reference leads to; null where that is gone
py::object target_of(PyObject* reference) {
    if (!PyWeakref_Check(reference)) throw py::type_error("a weak reference was expected");
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* target = nullptr;
    PyWeakref_GetRef(reference, &target);
    return new_reference(target);
#else
    PyObject* const target = PyWeakref_GET_OBJECT(reference);
    return py::reinterpret_borrow<py::object>(target == Py_None ? nullptr : target);
#endif
}

// an attribute, or an entry; null where there is none
py::object found_or_null(PyObject* object) {
    if (object == nullptr) PyErr_Clear();
    return new_reference(object);
}

// The places and things of jlebm_fast/recognition/snapshots.py, one after another, beside what is there now. Objects
// are told by their addresses: nothing is asked of them but where the next ones are.
class Walk {
public:
    Walk(py::handle kinds, py::handle things) : things_(things) {
        if (!PyByteArray_Check(kinds.ptr())) throw py::type_error("kinds must be a bytearray");
        kinds_ = PyByteArray_AS_STRING(kinds.ptr());
        left_ = size_t(PyByteArray_GET_SIZE(kinds.ptr()));
        things_.expect(left_, "what is told by these kinds");
    }

    bool same() {
        while (left_ > 0)
            if (!same_place()) return false;
        return true;
    }

private:
    char next(PyObject*& thing) {
        if (left_ == 0) throw std::invalid_argument("the kinds end inside a place");
        --left_;
        thing = things_.next().ptr();
        return *kinds_++;
    }

    bool same_place() {
        PyObject* thing;
        switch (next(thing)) {
        case 'M':
            return same_module(target_of(thing).ptr());
        case 'N': {
            Fields place(thing);
            const py::handle mapping = place.next();
            const py::object value = found_or_null(PyObject_GetItem(mapping.ptr(), place.next().ptr()));
            return same_value(value ? value.ptr() : Py_None);
        }
        case 'C':
            return same_closure(target_of(thing).ptr());
        case 'F': {
            Fields place(thing);
            const py::handle cls = place.next();
            return found_or_null(PyObject_GetAttrString(cls.ptr(), "forward")).ptr() == place.next().ptr();
        }
        case 'H':
            return same_value(thing);
        default:
            throw std::invalid_argument("a place was expected");
        }
    }

    bool same_module(PyObject* module) { return module != nullptr && same_value(module) && same_attributes(module); }

    bool same_attributes(PyObject* object) {
        static PyObject* const name = PyUnicode_InternFromString("__dict__");
        const py::object attributes = found_or_null(PyObject_GetAttr(object, name));
        return attributes && same_value(attributes.ptr());
    }

    bool same_closure(PyObject* function) {
        if (function == nullptr || !PyFunction_Check(function)) return false;
        PyObject* const cells = PyFunction_GET_CLOSURE(function);
        if (cells == nullptr) return false;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(cells); ++i)
            if (!same_value(PyCell_GET(PyTuple_GET_ITEM(cells, i)))) return false;
        return true;
    }

    // found: null of a closure's variable without a value
    bool same_value(PyObject* found) {
        PyObject* thing;
        const char kind = next(thing);
        if (found == nullptr) return kind == 'e';
        switch (kind) {
        case 'o':
            return found == thing;
        case 'w':
            return target_of(thing).ptr() == found;
        case 'a':
            return PyLong_AsVoidPtr(thing) == found;
        case 'c':
            return reinterpret_cast<PyObject*>(Py_TYPE(found)) == thing;
        case 'n': {
            const Py_ssize_t size = PyObject_Size(found);
            if (size < 0) PyErr_Clear(); // it has none any more
            return size >= 0 && size == PyLong_AsSsize_t(thing);
        }
        case 'd':
            return same_items(found, PyLong_AsSsize_t(thing), true);
        case 'D':
            return same_items(found, PyLong_AsSsize_t(thing), false);
        case 'l':
            return same_entries(found, PyLong_AsSsize_t(thing), true);
        case 'L':
            return same_entries(found, PyLong_AsSsize_t(thing), false);
        case 'v':
            return same_attributes(found);
        case 'e':
        case 'x':
            return false;
        default:
            throw std::invalid_argument("a value was expected");
        }
    }

    bool same_items(PyObject* dict, Py_ssize_t n, bool all) {
        if (!PyDict_Check(dict) || (all ? PyDict_GET_SIZE(dict) != n : PyDict_GET_SIZE(dict) < n)) return false;
        PyObject *key, *value;
        Py_ssize_t position = 0;
        while (n-- > 0) {
            if (!PyDict_Next(dict, &position, &key, &value)) return false;
            if (left_ > 0 && *kinds_ == 's') {
                PyObject* thing;
                next(thing);
                // a key that took another's place would stand behind all others, and be found there
                for (Py_ssize_t skipped = PyLong_AsSsize_t(thing) - 1; skipped > 0; --skipped, --n)
                    if (!PyDict_Next(dict, &position, &key, &value)) return false;
                continue;
            }
            // what is asked of a value may run code that changes the dict
            const py::object kept = py::reinterpret_borrow<py::object>(value);
            if (!same_value(key) || !same_value(kept.ptr())) return false;
        }
        return true;
    }

    bool same_entries(PyObject* list, Py_ssize_t n, bool all) {
        if (!PyList_Check(list) && !PyTuple_Check(list)) return false;
        for (Py_ssize_t i = 0; i < n; ++i) {
            if (i >= Py_SIZE(list)) return false;
            const py::handle entry = PyList_Check(list) ? PyList_GET_ITEM(list, i) : PyTuple_GET_ITEM(list, i);
            if (!same_value(py::reinterpret_borrow<py::object>(entry).ptr())) return false;
        }
        return !all || Py_SIZE(list) == n;
    }

    const char* kinds_;
    size_t left_;
    Fields things_;
};

bool same_things(py::handle kinds, py::handle things) { return Walk(kinds, things).same(); }

} // namespace

void bind_objects(py::module_& m) {
    m.def("same_things", &same_things, py::arg("kinds"), py::arg("things"),
          "whether the very objects of a jlebm_fast.recognition.snapshots.Objects still lie in their places");
}

} // namespace jlebm
