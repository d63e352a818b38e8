//! Threads for parallel regions: one region at a time, tasks claimed from one counter.
//!
//! Owns the threads, the protocol by which they enter and leave a region, and the policy of when an
//! idle thread spins, yields or parks. It refuses to know what a task computes, to queue work, and to
//! allocate for a region. A region ends when its tasks are done, not when every thread has woken: a
//! thread that the operating system has not scheduled yet never delays it.
//!
//! Which thread runs a task is not defined, so a result must never depend on it.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// A fixed set of threads that run the tasks of one region together with the caller.
///
/// Dropping the pool ends and joins its threads.
pub struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held by the caller whose region is running.
    turn: Mutex<()>,
}

impl std::fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads()).finish()
    }
}

impl ThreadPool {
    /// A pool of `threads` threads, counting the one that calls [`run`](Self::run), so `threads - 1`
    /// are started. `threads` is clamped to 1..=[`THREADS_MAX`]. When the system refuses a thread the
    /// pool goes on with fewer: results do not depend on their number.
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, THREADS_MAX);
        let shared = Arc::new(Shared::new(threads - 1));
        let mut started = Vec::with_capacity(threads - 1);
        for index in 0..threads - 1 {
            let of_thread = Arc::clone(&shared);
            let name = format!("vine-kernel-{}", index + 1);
            match thread::Builder::new().name(name).spawn(move || serve(&of_thread, index)) {
                Ok(handle) => started.push(handle),
                Err(_) => break,
            }
        }
        Self { shared, threads: started, turn: Mutex::new(()) }
    }

    /// Threads that take part in a region, the caller included.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each exactly once, on all threads, and returns when all are
    /// done. Tasks are claimed in ascending order.
    ///
    /// Called from inside a task it runs its own tasks serially on that thread. Concurrent callers take
    /// turns.
    ///
    /// # Panics
    /// With the payload of the first task that panicked, after all running tasks have ended; tasks that
    /// had not begun then are not run. The pool stays usable.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.threads.is_empty() || IN_REGION.get() {
            (0..tasks).for_each(task);
            return;
        }
        let turn = lock(&self.turn);
        let outcome = self.run_region(tasks, task);
        drop(turn);
        if let Some(payload) = outcome {
            resume_unwind(payload);
        }
    }

    /// Cuts `data` into pieces of `chunk_len` elements (the last may be shorter) and runs
    /// `task(index, piece)` for each, on all threads.
    ///
    /// # Panics
    /// If `chunk_len` is zero, and as [`run`](Self::run).
    pub fn run_chunks<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(chunk_len > 0, "chunk length must not be zero");
        let len = data.len();
        let base = SharedPtr(data.as_mut_ptr());
        self.run(len.div_ceil(chunk_len), &|index| {
            let start = index * chunk_len;
            let count = chunk_len.min(len - start);
            // SAFETY: `run` calls each index once, so pieces are disjoint and inside `data`, which is
            // borrowed mutably until `run` has returned. `T: Send` lets a piece visit another thread.
            let piece = unsafe { std::slice::from_raw_parts_mut(base.ptr().add(start), count) };
            task(index, piece);
        });
    }

    /// As [`run_chunks`](Self::run_chunks) over two slices cut in step: piece `i` of `a` has
    /// `a_chunk_len` elements, piece `i` of `b` has `b_chunk_len`.
    ///
    /// # Panics
    /// If a chunk length is zero or the slices do not have the same number of pieces.
    pub fn run_chunks2<A: Send, B: Send>(
        &self,
        a: &mut [A],
        a_chunk_len: usize,
        b: &mut [B],
        b_chunk_len: usize,
        task: impl Fn(usize, &mut [A], &mut [B]) + Sync,
    ) {
        assert!(a_chunk_len > 0 && b_chunk_len > 0, "chunk length must not be zero");
        let (a_len, b_len) = (a.len(), b.len());
        let pieces = a_len.div_ceil(a_chunk_len);
        assert_eq!(pieces, b_len.div_ceil(b_chunk_len), "slices differ in their number of pieces");
        let (a_base, b_base) = (SharedPtr(a.as_mut_ptr()), SharedPtr(b.as_mut_ptr()));
        self.run(pieces, &|index| {
            let (a_start, b_start) = (index * a_chunk_len, index * b_chunk_len);
            let a_count = a_chunk_len.min(a_len - a_start);
            let b_count = b_chunk_len.min(b_len - b_start);
            // SAFETY: as in `run_chunks`, for each of the two slices.
            let (a_piece, b_piece) = unsafe {
                (
                    std::slice::from_raw_parts_mut(a_base.ptr().add(a_start), a_count),
                    std::slice::from_raw_parts_mut(b_base.ptr().add(b_start), b_count),
                )
            };
            task(index, a_piece, b_piece);
        });
    }

    fn run_region(
        &self,
        tasks: usize,
        task: &(dyn Fn(usize) + Sync),
    ) -> Option<Box<dyn Any + Send>> {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `close` below returns after every thread that copied
        // this pointer has left the region, and none can enter afterwards.
        let task: TaskPtr = unsafe { std::mem::transmute(task) };
        // SAFETY: the region is closed and nobody is inside (that is how `close` ended the last one),
        // and `turn` keeps other callers out, so nothing else accesses the cell.
        unsafe { *shared.job.get() = Some(Job { task, tasks }) };
        shared.next.0.store(0, Ordering::Relaxed);
        let epoch = (shared.gate.0.load(Ordering::Relaxed) >> EPOCH_SHIFT) + 1;
        shared.gate.0.store(epoch << EPOCH_SHIFT | OPEN, Ordering::Release);
        self.wake(tasks - 1);

        IN_REGION.set(true);
        shared.work(Job { task, tasks });
        IN_REGION.set(false);
        self.close();
        lock(&shared.panicked).take()
    }

    /// Wakes at most `wanted` threads of those that are parked.
    fn wake(&self, wanted: usize) {
        // Orders the opened gate before the reads of `parked`; `serve` has the counterpart.
        fence(Ordering::SeqCst);
        let mut left = wanted;
        for (parked, handle) in self.shared.parked.iter().zip(&self.threads) {
            if left == 0 {
                break;
            }
            if parked.0.load(Ordering::Relaxed) && parked.0.swap(false, Ordering::AcqRel) {
                handle.thread().unpark();
            }
            left -= 1;
        }
    }

    /// Keeps new threads out of the region and waits until those inside have left.
    fn close(&self) {
        let gate = &self.shared.gate.0;
        if gate.fetch_and(!OPEN, Ordering::AcqRel) & INSIDE == 0 {
            return;
        }
        let mut patience = Patience::new();
        while gate.load(Ordering::Acquire) & INSIDE != 0 {
            if patience.wait() {
                continue;
            }
            *lock(&self.shared.caller) = Some(thread::current());
            gate.fetch_or(CALLER_PARKED, Ordering::AcqRel);
            while gate.load(Ordering::Acquire) & INSIDE != 0 {
                thread::park();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        for handle in self.threads.drain(..) {
            handle.thread().unpark();
            // Tasks cannot unwind out of `serve`, so there is no panic to pass on.
            let _ = handle.join();
        }
    }
}

type TaskPtr = *const (dyn Fn(usize) + Sync + 'static);

#[derive(Clone, Copy)]
struct Job {
    task: TaskPtr,
    tasks: usize,
}

#[repr(align(64))]
struct Padded<T>(T);

struct Shared {
    /// Epoch, flags and number of threads inside: see the constants.
    gate: Padded<AtomicU64>,
    /// The next task to claim.
    next: Padded<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
    parked: Vec<Padded<AtomicBool>>,
    panicked: Mutex<Option<Box<dyn Any + Send>>>,
    caller: Mutex<Option<Thread>>,
    ended: AtomicBool,
}

// SAFETY: `job` is the only member that is not Sync. It is written by the caller that holds `turn`
// while the gate is closed and empty, and read only by threads that are inside.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to a `Sync` closure and is only followed inside a region.
unsafe impl Send for Shared {}

impl Shared {
    fn new(threads: usize) -> Self {
        Self {
            gate: Padded(AtomicU64::new(0)),
            next: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(None),
            parked: (0..threads).map(|_| Padded(AtomicBool::new(false))).collect(),
            panicked: Mutex::new(None),
            caller: Mutex::new(None),
            ended: AtomicBool::new(false),
        }
    }

    /// Claims and runs tasks until none is left. Does not unwind.
    fn work(&self, job: Job) {
        // SAFETY: the caller of `run` keeps the closure alive until the region is closed and empty;
        // who calls this is either that caller or a thread inside.
        let task = unsafe { &*job.task };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let index = self.next.0.fetch_add(1, Ordering::Relaxed);
                if index >= job.tasks {
                    break;
                }
                task(index);
            }
        }));
        if let Err(payload) = outcome {
            self.next.0.store(job.tasks, Ordering::Relaxed);
            lock(&self.panicked).get_or_insert(payload);
        }
    }

    /// Enters the open region if there is one that is newer than `seen`, and returns its epoch.
    fn enter(&self, seen: u64) -> Option<u64> {
        let mut gate = self.gate.0.load(Ordering::Acquire);
        while gate & OPEN != 0 && gate >> EPOCH_SHIFT != seen {
            match self.gate.0.compare_exchange_weak(
                gate,
                gate + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(gate >> EPOCH_SHIFT),
                Err(now) => gate = now,
            }
        }
        None
    }

    fn leave(&self) {
        let before = self.gate.0.fetch_sub(1, Ordering::AcqRel);
        if before & CALLER_PARKED != 0
            && before & INSIDE == 1
            && let Some(caller) = lock(&self.caller).take()
        {
            caller.unpark();
        }
    }
}

/// The life of a thread of the pool.
fn serve(shared: &Shared, index: usize) {
    IN_REGION.set(true);
    let parked = &shared.parked[index].0;
    let mut seen = 0;
    let mut patience = Patience::new();
    while !shared.ended.load(Ordering::Acquire) {
        if let Some(epoch) = shared.enter(seen) {
            seen = epoch;
            // SAFETY: this thread is inside, so the caller does not write the cell.
            let job = unsafe { *shared.job.get() };
            shared.work(job.expect("a region opens after its job is set"));
            shared.leave();
            patience = Patience::new();
        } else if !patience.wait() {
            parked.store(true, Ordering::SeqCst);
            // Orders the mark before the reads of the gate; `wake` has the counterpart, so either it
            // sees the mark or this thread sees the open gate.
            fence(Ordering::SeqCst);
            let gate = shared.gate.0.load(Ordering::Acquire);
            let open = gate & OPEN != 0 && gate >> EPOCH_SHIFT != seen;
            if !open && !shared.ended.load(Ordering::SeqCst) {
                thread::park();
            }
            parked.store(false, Ordering::SeqCst);
            patience = Patience::woken();
        }
    }
}

/// How long to wait before parking: first spin, then yield to whoever else wants the core.
struct Patience {
    spins_left: u32,
    yield_until: Option<Instant>,
    yield_for: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { spins_left: SPINS, yield_until: None, yield_for: YIELD_FOR }
    }

    /// After a wake-up that may have been spurious: look once more, then park again.
    fn woken() -> Self {
        Self { spins_left: 1, yield_until: None, yield_for: Duration::ZERO }
    }

    /// Passes a moment; false when it is time to park.
    fn wait(&mut self) -> bool {
        if self.spins_left > 0 {
            self.spins_left -= 1;
            std::hint::spin_loop();
            return true;
        }
        let now = Instant::now();
        let until = *self.yield_until.get_or_insert(now + self.yield_for);
        if now >= until {
            return false;
        }
        thread::yield_now();
        true
    }
}

/// A base pointer that tasks share; each uses its own part.
struct SharedPtr<T>(*mut T);

impl<T> SharedPtr<T> {
    fn ptr(&self) -> *mut T {
        self.0
    }
}

// SAFETY: the users in this module hand disjoint parts to different tasks and require `T: Send`.
unsafe impl<T: Send> Sync for SharedPtr<T> {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No invariant of these mutexes can be broken half way: each guards one plain value.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

thread_local! {
    /// True on a thread that is running tasks, so that a nested region runs inline.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// More threads than this are not started.
pub const THREADS_MAX: usize = 512;

/// Looks at the gate before the first yield: about 20 microseconds, longer than the serial work
/// between two regions of a layer. Under Miri, where each look takes as long as a thousand, a few.
const SPINS: u32 = if cfg!(miri) { 4 } else { 600 };
/// Yielding time before a thread parks. Longer than the gaps inside a step, far shorter than the time
/// between two steps of a node that has little to do.
const YIELD_FOR: Duration = Duration::from_micros(100);

const INSIDE: u64 = 0xffff;
const OPEN: u64 = 1 << 16;
const CALLER_PARKED: u64 = 1 << 17;
const EPOCH_SHIFT: u32 = 18;

#[cfg(test)]
mod tests;
