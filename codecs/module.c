/* The Python binding, streamsink._codecs: one type for each direction of each codec. It checks what it is given, makes
 * the arrays and releases the GIL where a block is longer than a frame; the kernels know nothing of Python.
 *
 * streamsink/_codecs.pyi documents the types. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <stdlib.h>
#include <string.h>

#include "g711.h"
#include "g722.h"
#include "l16.h"
#include "resample.h"

static PyObject *CodecError; /* streamsink.errors.CodecError */
static PyObject *filters;    /* (rate_in, rate_out) -> capsule of the resample_filter its resamplers share */

/* Every object begins so: `busy` is set while its state is being changed, with the GIL held or not. */
typedef struct {
    PyObject_HEAD
    char busy;
} codec_object;

/* Checked with the GIL held, which nothing gives up between here and RUN. */
static int idle(codec_object *self)
{
    if (self->busy)
        PyErr_SetString(CodecError, "this object is at work in another thread; give each thread its own");
    return !self->busy;
}

/* Runs `call` on idle state, without the GIL when `release`. */
#define RUN(self, release, call)                  \
    do {                                          \
        ((codec_object *)(self))->busy = 1;       \
        if (release) {                            \
            Py_BEGIN_ALLOW_THREADS                \
            call;                                 \
            Py_END_ALLOW_THREADS                  \
        } else {                                  \
            call;                                 \
        }                                         \
        ((codec_object *)(self))->busy = 0;       \
    } while (0)

/* A payload: bytes by the short way, any other C-contiguous buffer of octets by the buffer protocol. */
typedef struct {
    const uint8_t *octets;
    size_t size;
    Py_buffer view; /* view.obj is NULL by the short way */
} payload;

static int payload_take(payload *p, PyObject *argument)
{
    p->view.obj = NULL;
    if (PyBytes_Check(argument)) {
        p->octets = (const uint8_t *)PyBytes_AsString(argument);
        p->size = (size_t)PyBytes_Size(argument);
        return 1;
    }
    if (PyObject_GetBuffer(argument, &p->view, PyBUF_SIMPLE) < 0) {
        PyErr_Clear();
        PyErr_Format(CodecError, "expected a payload as bytes, got %R", (PyObject *)Py_TYPE(argument));
        return 0;
    }
    if (p->view.itemsize != 1) {
        PyErr_Format(CodecError, "expected a payload as bytes, got %R with items of %zd bytes",
                     (PyObject *)Py_TYPE(argument), p->view.itemsize);
        PyBuffer_Release(&p->view);
        return 0;
    }
    p->octets = p->view.buf;
    p->size = (size_t)p->view.len;
    return 1;
}

static void payload_drop(payload *p)
{
    if (p->view.obj)
        PyBuffer_Release(&p->view);
}

/* The samples of an int16 array of one dimension, or NULL with an error that says what came. */
static const int16_t *samples_take(PyObject *argument, size_t *samples)
{
    if (!PyArray_Check(argument)) {
        PyErr_Format(CodecError, "expected samples as a numpy array of int16, got %R", (PyObject *)Py_TYPE(argument));
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)argument;
    if (PyArray_TYPE(array) != NPY_INT16 || !PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(CodecError, "expected samples of dtype int16 in native byte order, got dtype %S",
                     (PyObject *)PyArray_DESCR(array));
        return NULL;
    }
    if (PyArray_NDIM(array) != 1) {
        PyErr_Format(CodecError, "expected samples of shape (n,), got an array of %d dimensions", PyArray_NDIM(array));
        return NULL;
    }
    if (!PyArray_IS_C_CONTIGUOUS(array) || !PyArray_ISALIGNED(array)) {
        PyErr_Format(CodecError, "expected contiguous, aligned samples, got a stride of %zd bytes%s; copy them first",
                     (Py_ssize_t)PyArray_STRIDE(array, 0), PyArray_ISALIGNED(array) ? "" : " off an odd address");
        return NULL;
    }
    *samples = (size_t)PyArray_DIM(array, 0);
    return PyArray_DATA(array);
}

static PyObject *new_samples(size_t n)
{
    npy_intp shape = (npy_intp)n;
    return PyArray_SimpleNew(1, &shape, NPY_INT16);
}

static int16_t *samples_of(PyObject *array) { return PyArray_DATA((PyArrayObject *)array); }

static void codec_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *codec_alloc(PyTypeObject *type)
{
    allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

/* ---- G.722 ---- */

typedef struct {
    codec_object head;
    g722 state;
} g722_object;

static PyObject *g722_decoder_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"mode", NULL};
    int mode = 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|i:G722Decoder", names, &mode))
        return NULL;
    if (mode < 1 || mode > 3)
        return PyErr_Format(CodecError, "G.722 has the modes 1, 2 and 3, got %d", mode);
    PyObject *self = codec_alloc(type);
    if (self)
        g722_init(&((g722_object *)self)->state, mode);
    return self;
}

static PyObject *g722_encoder_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, keywords, ":G722Encoder", names))
        return NULL;
    PyObject *self = codec_alloc(type);
    if (self)
        g722_init(&((g722_object *)self)->state, 1);
    return self;
}

static PyObject *g722_decoder_decode(PyObject *object, PyObject *argument)
{
    g722_object *self = (g722_object *)object;
    payload in;
    if (!payload_take(&in, argument))
        return NULL;
    PyObject *out = idle(&self->head) ? new_samples(2 * in.size) : NULL;
    if (out) {
        int16_t *samples = samples_of(out);
        RUN(self, in.size > 160, g722_decode(&self->state, in.octets, in.size, samples));
    }
    payload_drop(&in);
    return out;
}

static PyObject *g722_encoder_encode(PyObject *object, PyObject *argument)
{
    g722_object *self = (g722_object *)object;
    size_t samples;
    const int16_t *in = samples_take(argument, &samples);
    if (!in || !idle(&self->head))
        return NULL;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)((samples + self->state.is_odd) / 2));
    if (out) {
        uint8_t *octets = (uint8_t *)PyBytes_AsString(out);
        RUN(self, samples > 320, g722_encode(&self->state, in, samples, octets));
    }
    return out;
}

/* ---- G.711 ---- */

typedef struct {
    codec_object head;
    const g711_law *law;
} g711_object;

static PyObject *g711_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"law", NULL};
    const char *law;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "s:G711", names, &law))
        return NULL;
    int is_mulaw = strcmp(law, "PCMU") == 0;
    if (!is_mulaw && strcmp(law, "PCMA") != 0)
        return PyErr_Format(CodecError, "G.711 has the laws PCMU and PCMA, got %.20s", law);
    PyObject *self = codec_alloc(type);
    if (self)
        ((g711_object *)self)->law = is_mulaw ? &g711_mulaw : &g711_alaw;
    return self;
}

static PyObject *g711_object_decode(PyObject *object, PyObject *argument)
{
    g711_object *self = (g711_object *)object;
    payload in;
    if (!payload_take(&in, argument))
        return NULL;
    PyObject *out = idle(&self->head) ? new_samples(in.size) : NULL;
    if (out) {
        int16_t *samples = samples_of(out);
        RUN(self, in.size > 160, g711_decode(self->law, in.octets, in.size, samples));
    }
    payload_drop(&in);
    return out;
}

static PyObject *g711_object_encode(PyObject *object, PyObject *argument)
{
    g711_object *self = (g711_object *)object;
    size_t samples;
    const int16_t *in = samples_take(argument, &samples);
    if (!in || !idle(&self->head))
        return NULL;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)samples);
    if (out) {
        uint8_t *octets = (uint8_t *)PyBytes_AsString(out);
        RUN(self, samples > 160, g711_encode(self->law, in, samples, octets));
    }
    return out;
}

/* ---- L16 ---- */

typedef struct {
    codec_object head;
    l16 state;
} l16_object;

#define L16_FRAME 960 /* samples in 20 ms at 48 kHz, the highest rate */

static PyObject *l16_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"byteorder", NULL};
    const char *order;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "s:L16", names, &order))
        return NULL;
    int is_big = strcmp(order, "big") == 0;
    if (!is_big && strcmp(order, "little") != 0)
        return PyErr_Format(CodecError, "L16 has the byte orders little and big, got %.20s", order);
    PyObject *self = codec_alloc(type);
    if (self)
        ((l16_object *)self)->state = (l16){.is_big = (uint8_t)is_big};
    return self;
}

static PyObject *l16_object_decode(PyObject *object, PyObject *argument)
{
    l16_object *self = (l16_object *)object;
    payload in;
    if (!payload_take(&in, argument))
        return NULL;
    size_t samples = (in.size + self->state.is_odd) / 2;
    PyObject *out = idle(&self->head) ? new_samples(samples) : NULL;
    if (out) {
        int16_t *to = samples_of(out);
        RUN(self, samples > L16_FRAME, l16_decode(&self->state, in.octets, in.size, to));
    }
    payload_drop(&in);
    return out;
}

static PyObject *l16_object_encode(PyObject *object, PyObject *argument)
{
    l16_object *self = (l16_object *)object;
    size_t samples;
    const int16_t *in = samples_take(argument, &samples);
    if (!in || !idle(&self->head))
        return NULL;
    PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(2 * samples));
    if (out) {
        uint8_t *octets = (uint8_t *)PyBytes_AsString(out);
        RUN(self, samples > L16_FRAME, l16_encode(&self->state, in, samples, octets));
    }
    return out;
}

/* ---- Resampler ---- */

typedef struct {
    codec_object head;
    uint32_t rate; /* of the input, Hz */
    PyObject *filter;
    resampler *state; /* NULL where the rates are equal and samples pass as they are */
} resampler_object;

#define LOWEST_RATE 8000
#define HIGHEST_RATE 192000

static void filter_free(PyObject *capsule) { free(PyCapsule_GetPointer(capsule, NULL)); }

/* A new reference to the capsule of a pair's filter, designed where it is the first of its pair. */
static PyObject *filter_for(unsigned rate_in, unsigned rate_out)
{
    PyObject *key = Py_BuildValue("II", rate_in, rate_out);
    if (!key)
        return NULL;
    PyObject *capsule = PyDict_GetItemWithError(filters, key);
    Py_XINCREF(capsule);
    if (!capsule && !PyErr_Occurred()) {
        resample_filter *filter = resample_design(rate_in, rate_out);
        if (!filter) {
            PyErr_NoMemory();
        } else if (!(capsule = PyCapsule_New(filter, NULL, filter_free))) {
            free(filter);
        } else if (PyDict_SetItem(filters, key, capsule) < 0) {
            Py_CLEAR(capsule);
        }
    }
    Py_DECREF(key);
    return capsule;
}

static PyObject *resampler_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"rate_in", "rate_out", NULL};
    long rate_in, rate_out;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "ll:Resampler", names, &rate_in, &rate_out))
        return NULL;
    if (rate_in < LOWEST_RATE || rate_in > HIGHEST_RATE || rate_out < LOWEST_RATE || rate_out > HIGHEST_RATE)
        return PyErr_Format(CodecError, "rates from %d to %d Hz can be resampled, got %ld to %ld", LOWEST_RATE,
                            HIGHEST_RATE, rate_in, rate_out);
    resampler_object *self = (resampler_object *)codec_alloc(type);
    if (!self)
        return NULL;
    self->rate = (uint32_t)rate_in;
    if (rate_in != rate_out) {
        self->filter = filter_for((unsigned)rate_in, (unsigned)rate_out);
        const resample_filter *filter = self->filter ? PyCapsule_GetPointer(self->filter, NULL) : NULL;
        self->state = filter ? malloc(resampler_size(filter)) : NULL;
        if (!self->state) {
            if (!PyErr_Occurred())
                PyErr_NoMemory();
            Py_DECREF(self);
            return NULL;
        }
        resampler_init(self->state, filter);
    }
    return (PyObject *)self;
}

static void resampler_dealloc(PyObject *object)
{
    resampler_object *self = (resampler_object *)object;
    free(self->state);
    Py_XDECREF(self->filter);
    codec_dealloc(object);
}

/* Pushes samples, or that many zeros where in is NULL. */
static PyObject *pushed(resampler_object *self, const int16_t *in, size_t samples)
{
    PyObject *out = new_samples(resampler_due(self->state, samples));
    if (out) {
        int16_t *to = samples_of(out);
        RUN(self, samples > self->rate / 50, resampler_push(self->state, in, samples, to));
    }
    return out;
}

static PyObject *resampler_object_push(PyObject *object, PyObject *argument)
{
    resampler_object *self = (resampler_object *)object;
    size_t samples;
    const int16_t *in = samples_take(argument, &samples);
    if (!in || !idle(&self->head))
        return NULL;
    if (!self->state) {
        Py_INCREF(argument);
        return argument;
    }
    return pushed(self, in, samples);
}

static PyObject *resampler_object_flush(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    resampler_object *self = (resampler_object *)object;
    if (!idle(&self->head))
        return NULL;
    if (!self->state)
        return new_samples(0);
    PyObject *out = pushed(self, NULL, self->state->filter->tail);
    resampler_init(self->state, self->state->filter);
    return out;
}

static PyObject *resampler_object_reset(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    resampler_object *self = (resampler_object *)object;
    if (!idle(&self->head))
        return NULL;
    if (self->state)
        resampler_init(self->state, self->state->filter);
    Py_RETURN_NONE;
}

static PyObject *resampler_object_delay(PyObject *object, void *ignored)
{
    (void)ignored;
    resampler_object *self = (resampler_object *)object;
    return PyFloat_FromDouble(self->state ? resample_delay(self->state->filter) : 0.0);
}

/* ---- The types and the module ---- */

#define TYPE(variable, title, object, make, drop, methods, getset, doc)                                   \
    static PyType_Slot variable##_slots[] = {                                                            \
        {Py_tp_new, (void *)(make)}, {Py_tp_dealloc, (void *)(drop)}, {Py_tp_methods, methods},          \
        {Py_tp_getset, getset},      {Py_tp_doc, (void *)(doc)},      {0, NULL},                         \
    };                                                                                                   \
    static PyType_Spec variable = {                                                                      \
        .name = "streamsink._codecs." title,                                                             \
        .basicsize = sizeof(object),                                                                     \
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,                                          \
        .slots = variable##_slots,                                                                       \
    }

/* What an encoder that answers must use; only L16 has a choice. */
static PyObject *l16_byteorder(PyObject *object, void *ignored)
{
    (void)ignored;
    return PyUnicode_FromString(((l16_object *)object)->state.is_big ? "big" : "little");
}

static PyObject *byteorder(PyObject *object, void *ignored)
{
    (void)object;
    (void)ignored;
    return PyUnicode_FromString("little");
}

static PyGetSetDef no_getset[] = {{NULL, NULL, NULL, NULL, NULL}};
static PyGetSetDef decoder_getset[] = {
    {"byteorder", byteorder, NULL, "What an encoder that answers must use: little or big.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyGetSetDef l16_getset[] = {
    {"byteorder", l16_byteorder, NULL, "What an encoder that answers must use: little or big.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define DECODE                          \
    "decode($self, payload, /)\n--\n\n" \
    "Turn a payload of any size into samples: int16, shape (n,), an array of its own."
#define ENCODE                          \
    "encode($self, samples, /)\n--\n\n" \
    "Turn samples (int16, shape (n,), contiguous) into a payload."

static PyMethodDef g722_decoder_methods[] = {{"decode", g722_decoder_decode, METH_O, DECODE}, {NULL, NULL, 0, NULL}};
static PyMethodDef g722_encoder_methods[] = {{"encode", g722_encoder_encode, METH_O, ENCODE}, {NULL, NULL, 0, NULL}};
static PyMethodDef g711_decoder_methods[] = {{"decode", g711_object_decode, METH_O, DECODE}, {NULL, NULL, 0, NULL}};
static PyMethodDef g711_encoder_methods[] = {{"encode", g711_object_encode, METH_O, ENCODE}, {NULL, NULL, 0, NULL}};
static PyMethodDef l16_decoder_methods[] = {{"decode", l16_object_decode, METH_O, DECODE}, {NULL, NULL, 0, NULL}};
static PyMethodDef l16_encoder_methods[] = {{"encode", l16_object_encode, METH_O, ENCODE}, {NULL, NULL, 0, NULL}};
static PyMethodDef resampler_methods[] = {
    {"push", resampler_object_push, METH_O,
     "push($self, samples, /)\n--\n\n"
     "Take samples in (int16, shape (n,), contiguous) and return what is due: after n samples\n"
     "floor(n * rate_out / rate_in) are out. An array of its own; at equal rates the one that came."},
    {"flush", resampler_object_flush, METH_NOARGS,
     "flush($self, /)\n--\n\nReturn what the delay holds back, up to the last sample's place, and forget everything."},
    {"reset", resampler_object_reset, METH_NOARGS,
     "reset($self, /)\n--\n\nForget everything: the next push begins a signal."},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef resampler_getset[] = {
    {"delay", resampler_object_delay, NULL, "Seconds by which the output lags the input; a float.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define ALONE                                                                                      \
    "An object belongs to one thread at a time; a second that enters it gets a CodecError. Blocks\n" \
    "of more than 20 ms run without the GIL."

TYPE(g711_decoder, "G711Decoder", g711_object, g711_new, codec_dealloc, g711_decoder_methods, decoder_getset,
     "G711Decoder(law)\n--\n\nITU-T G.711, law PCMU or PCMA, at 8 kHz; 32 bytes an object.\n\n" ALONE);
TYPE(g711_encoder, "G711Encoder", g711_object, g711_new, codec_dealloc, g711_encoder_methods, no_getset,
     "G711Encoder(law)\n--\n\nITU-T G.711, law PCMU or PCMA, at 8 kHz; 32 bytes an object.\n\n" ALONE);
TYPE(g722_decoder, "G722Decoder", g722_object, g722_decoder_new, codec_dealloc, g722_decoder_methods, decoder_getset,
     "G722Decoder(mode=1)\n--\n\n"
     "ITU-T G.722 at 16 kHz, mode 1, 2 or 3 for 64, 56 or 48 kbit/s; 224 bytes an object.\n\n" ALONE);
TYPE(g722_encoder, "G722Encoder", g722_object, g722_encoder_new, codec_dealloc, g722_encoder_methods, no_getset,
     "G722Encoder()\n--\n\n"
     "ITU-T G.722 at 16 kHz, 64 kbit/s; 224 bytes an object. An octet is two samples; an odd one waits for\n"
     "the next call.\n\n" ALONE);
TYPE(l16_decoder, "L16Decoder", l16_object, l16_new, codec_dealloc, l16_decoder_methods, l16_getset,
     "L16Decoder(byteorder)\n--\n\n"
     "L16 (RFC 3551), little or big; 32 bytes an object. An odd octet waits for the next payload.\n\n" ALONE);
TYPE(l16_encoder, "L16Encoder", l16_object, l16_new, codec_dealloc, l16_encoder_methods, no_getset,
     "L16Encoder(byteorder)\n--\n\nL16 (RFC 3551), little or big; 32 bytes an object.\n\n" ALONE);
TYPE(resampler_type, "Resampler", resampler_object, resampler_new, resampler_dealloc, resampler_methods,
     resampler_getset,
     "Resampler(rate_in, rate_out)\n--\n\n"
     "A streaming polyphase FIR between any two integer rates from 8000 to 192000 Hz.\n\n"
     "Flat to 0.12 dB up to 0.42 of the lower rate, 75 dB down from half of it on, 21.5 periods of the\n"
     "lower rate late (2.7 ms at 8 kHz). Every push returns its share; clipping saturates. About 270 bytes an\n"
     "object for 8 to 16 kHz, 4.2 kB for 192 to 8; the filter is shared by all resamplers of a pair of rates\n"
     "and is designed for the first in less than a millisecond.\n\n" ALONE);

static PyType_Spec *const TYPES[] = {
    &g722_decoder, &g722_encoder, &g711_decoder, &g711_encoder, &l16_decoder, &l16_encoder, &resampler_type,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "streamsink._codecs", .m_size = -1};

PyMODINIT_FUNC PyInit__codecs(void)
{
    import_array();
    g711_init();
    PyObject *errors = PyImport_ImportModule("streamsink.errors");
    CodecError = errors ? PyObject_GetAttrString(errors, "CodecError") : NULL;
    Py_XDECREF(errors);
    filters = PyDict_New();
    PyObject *module = CodecError && filters ? PyModule_Create(&definition) : NULL;
    for (size_t i = 0; module && i < sizeof TYPES / sizeof *TYPES; i++) {
        PyObject *type = PyType_FromSpec(TYPES[i]);
        if (!type || PyModule_AddType(module, (PyTypeObject *)type) < 0)
            Py_CLEAR(module);
        Py_XDECREF(type);
    }
    return module;
}
