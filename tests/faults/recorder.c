/* Preloaded into a process, writes every change that it makes below one folder into a log, and can let them fail.

   GRZOO_TRACE_ROOT: the folder, an absolute path. GRZOO_TRACE_LOG: the log, appended to by all processes.
   A record: one line "op result path path2 offset size\n" (paths relative to the root, "-" for none) and `size` bytes.
   `recorder_fail_after(n)`, called by ctypes, lets the n-th change from now on and all after it fail with ENOSPC
   (n < 0: none). `recorder_count()` says how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static int log_file = -1;
static long changes, fails_at = -1;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("GRZOO_TRACE_ROOT"), *log = getenv("GRZOO_TRACE_LOG");
    if (!folder || !log || !realpath(folder, root)) return;
    root_length = strlen(root);
    log_file = NEXT(open)(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
}

void recorder_fail_after(long n) { fails_at = n < 0 ? -1 : __atomic_load_n(&changes, __ATOMIC_SEQ_CST) + n; }
long recorder_count(void) { return __atomic_load_n(&changes, __ATOMIC_SEQ_CST); }

/* The path below the root, or NULL. */
static const char *inside(int directory, const char *path, char *buffer) {
    if (log_file < 0 || !path) return NULL;
    char base[PATH_MAX] = "";
    if (path[0] != '/') {
        if (directory == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return NULL;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return NULL;
            base[n] = 0;
        }
    }
    int n = base[0] ? snprintf(buffer, PATH_MAX, "%s/%s", base, path) : snprintf(buffer, PATH_MAX, "%s", path);
    if (n < 0 || n >= PATH_MAX) return NULL;
    if (strncmp(buffer, root, root_length) || (buffer[root_length] && buffer[root_length] != '/')) return NULL;
    return buffer[root_length] ? buffer + root_length + 1 : ".";
}

static const char *opened(int file, char *buffer) {
    char link[64];
    if (log_file < 0 || file == log_file) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, buffer, PATH_MAX - 1);
    if (n < 0) return NULL;
    buffer[n] = 0;
    char again[PATH_MAX];
    const char *found = inside(AT_FDCWD, buffer, again);
    return found ? strcpy(buffer, found) : NULL;
}

static int fails(void) {
    long number = __atomic_fetch_add(&changes, 1, __ATOMIC_SEQ_CST);
    if (fails_at < 0 || number < fails_at) return 0;
    errno = ENOSPC;
    return 1;
}

static void record(const char *op, const char *path, const char *path2, long offset, const void *data, size_t size) {
    int saved = errno;
    char head[2 * PATH_MAX + 64];
    int n = snprintf(head, sizeof head, "%s\t%s\t%s\t%ld\t%zu\n", op, path, path2, offset, size);
    struct iovec parts[2] = {{head, (size_t)n}, {(void *)data, size}};
    if (NEXT(writev)(log_file, parts, size ? 2 : 1) != (ssize_t)(n + size)) abort();
    errno = saved;
}

static int do_open(int directory, const char *path, int flags, mode_t mode, const char *function) {
    char buffer[PATH_MAX];
    const char *name = flags & (O_CREAT | O_TRUNC) ? inside(directory, path, buffer) : NULL;
    if (name && fails()) return -1;
    int (*next)(int, const char *, int, ...) = dlsym(RTLD_NEXT, function);
    int file = next(directory, path, flags, mode);
    if (name && file >= 0) record(flags & O_TRUNC ? "truncate" : "create", name, "-", 0, "", 0);
    return file;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode, "openat"); }
int open64(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode, "openat64"); }
int openat(int d, const char *path, int flags, ...) { MODE(flags) return do_open(d, path, flags, mode, "openat"); }
int openat64(int d, const char *path, int flags, ...) { MODE(flags) return do_open(d, path, flags, mode, "openat64"); }
int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

ssize_t write(int file, const void *data, size_t size) {
    char buffer[PATH_MAX];
    const char *name = opened(file, buffer);
    if (name && fails()) return -1;
    ssize_t n = NEXT(write)(file, data, size);
    if (name && n > 0) record("write", name, "-", lseek(file, 0, SEEK_CUR) - n, data, n);
    return n;
}

static ssize_t do_pwrite(int file, const void *data, size_t size, off64_t offset) {
    char buffer[PATH_MAX];
    const char *name = opened(file, buffer);
    if (name && fails()) return -1;
    ssize_t n = NEXT(pwrite64)(file, data, size, offset);
    if (name && n > 0) record("write", name, "-", offset, data, n);
    return n;
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) { return do_pwrite(file, data, size, offset); }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) { return do_pwrite(file, data, size, offset); }

ssize_t writev(int file, const struct iovec *parts, int count) {
    char buffer[PATH_MAX];
    const char *name = opened(file, buffer);
    if (!name) return NEXT(writev)(file, parts, count);
    for (int i = 0; i < count; i++)  /* one part is a legal answer */
        if (parts[i].iov_len) return write(file, parts[i].iov_base, parts[i].iov_len);
    return 0;
}

static int do_resize(int file, off64_t size) {
    char buffer[PATH_MAX];
    const char *name = opened(file, buffer);
    if (name && fails()) return -1;
    int result = NEXT(ftruncate64)(file, size);
    if (name && !result) record("resize", name, "-", size, "", 0);
    return result;
}
int ftruncate(int file, off_t size) { return do_resize(file, size); }
int ftruncate64(int file, off64_t size) { return do_resize(file, size); }

static int do_allocate(int file, off64_t offset, off64_t size) {
    char buffer[PATH_MAX];
    struct stat found;
    const char *name = opened(file, buffer);
    if (name && fails()) return ENOSPC;
    int result = NEXT(posix_fallocate64)(file, offset, size);
    if (name && !result && !fstat(file, &found)) record("resize", name, "-", found.st_size, "", 0);
    return result;
}
int posix_fallocate(int file, off_t offset, off_t size) { return do_allocate(file, offset, size); }
int posix_fallocate64(int file, off64_t offset, off64_t size) { return do_allocate(file, offset, size); }

static int do_sync(int file, const char *function) {
    char buffer[PATH_MAX];
    const char *name = opened(file, buffer);
    if (name && fails()) return -1;
    int (*next)(int) = dlsym(RTLD_NEXT, function);
    int result = next(file);
    if (name && !result) record("sync", name, "-", 0, "", 0);
    return result;
}
int fsync(int file) { return do_sync(file, "fsync"); }
int fdatasync(int file) { return do_sync(file, "fdatasync"); }

static int do_rename(int from, const char *old, int to, const char *new, unsigned flags) {
    char buffer[PATH_MAX], buffer2[PATH_MAX];
    const char *name = inside(from, old, buffer), *name2 = inside(to, new, buffer2);
    if ((name || name2) && fails()) return -1;
    int result = NEXT(renameat2)(from, old, to, new, flags);
    if (!result && name && name2) record("rename", name, name2, 0, "", 0);
    return result;
}
int rename(const char *old, const char *new) { return do_rename(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return do_rename(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) { return do_rename(from, old, to, new, flags); }

static int do_make(int directory, const char *path, mode_t mode) {
    char buffer[PATH_MAX];
    const char *name = inside(directory, path, buffer);
    if (name && fails()) return -1;
    int result = NEXT(mkdirat)(directory, path, mode);
    if (name && !result) record("mkdir", name, "-", 0, "", 0);
    return result;
}
int mkdir(const char *path, mode_t mode) { return do_make(AT_FDCWD, path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) { return do_make(directory, path, mode); }

static int do_remove(int directory, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *name = inside(directory, path, buffer);
    int result = NEXT(unlinkat)(directory, path, flags);  /* a full disk lets files go */
    if (name && !result) record("remove", name, "-", 0, "", 0);
    return result;
}
int unlink(const char *path) { return do_remove(AT_FDCWD, path, 0); }
int unlinkat(int directory, const char *path, int flags) { return do_remove(directory, path, flags); }
int rmdir(const char *path) { return do_remove(AT_FDCWD, path, AT_REMOVEDIR); }
