//! Memory that the host cannot reach, and the queue of what is to be done to it.

use engine::device::DeviceError;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A part of the memory. Holding one gives no way to what lies there.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    first: usize,
    len: usize,
}

/// One memory and its queue; clones are the same memory.
///
/// Nothing is done before somebody waits for it, so that whoever reads too early reads what was there.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    words: Words,
    queue: VecDeque<Kernel>,
    begun: u64,
    done: u64,
    waits: u64,
    /// The operation that fails, and everything from it on.
    fails_at: Option<u64>,
}

type Kernel = Box<dyn FnOnce(&mut Words) + Send>;

/// The memory as kernels see it.
#[derive(Default)]
pub struct Words(Vec<f32>);

impl Words {
    pub fn get(&self, region: Region) -> &[f32] {
        &self.0[region.first..][..region.len]
    }

    pub fn put(&mut self, region: Region, values: &[f32]) {
        self.0[region.first..][..region.len].copy_from_slice(values);
    }
}

impl Region {
    /// `len` words from `first` on.
    pub fn part(self, first: usize, len: usize) -> Region {
        assert!(first + len <= self.len, "{len} words at {first} of {}", self.len);
        Region { first: self.first + first, len }
    }
}

impl Memory {
    pub fn reserve(&self, len: usize) -> Region {
        let words = &mut self.lock().words.0;
        let first = words.len();
        // Not zero: what was never written must show.
        words.resize(first + len, f32::NAN);
        Region { first, len }
    }

    /// Copies from the host: `values` are taken before this returns, and there once it is their turn.
    pub fn copy_in(&self, to: Region, values: Vec<f32>) {
        self.begin(move |words| words.put(to, &values));
    }

    /// Puts an operation at the end of the queue.
    pub fn begin(&self, kernel: impl FnOnce(&mut Words) + Send + 'static) {
        let mut state = self.lock();
        state.begun += 1;
        state.queue.push_back(Box::new(kernel));
    }

    /// Waits for everything before, then copies out what `kernel` makes of the memory.
    pub fn copy_out<T>(&self, kernel: impl FnOnce(&mut Words) -> T) -> Result<T, DeviceError> {
        self.wait(self.begun())?;
        Ok(kernel(&mut self.lock().words))
    }

    /// Operations begun so far.
    pub fn begun(&self) -> u64 {
        self.lock().begun
    }

    /// Does the first `operations` of all that were begun.
    pub fn wait(&self, operations: u64) -> Result<(), DeviceError> {
        let mut state = self.lock();
        state.waits += 1;
        while state.done < operations {
            if state.fails_at.is_some_and(|at| at <= state.done) {
                return Err(DeviceError::Lost { reason: "it was told to".into() });
            }
            let kernel = state.queue.pop_front().expect("begun and not done");
            kernel(&mut state.words);
            state.done += 1;
        }
        Ok(())
    }

    /// Operations that nobody has waited for.
    pub fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    /// How often somebody has waited.
    pub fn waits(&self) -> u64 {
        self.lock().waits
    }

    /// Lets the operation after `more` further ones fail.
    pub fn fail_after(&self, more: u64) {
        let mut state = self.lock();
        state.fails_at = Some(state.begun + more);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
