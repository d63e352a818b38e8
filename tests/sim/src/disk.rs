//! A node's disk, which keeps one number: the incarnation. Writes are not durable until synced.

/// What a machine's shell may do with its disk.
pub trait Disk {
    fn write(&mut self, value: u64);
    /// Makes what was written durable; false if the disk lies.
    fn sync(&mut self);
    /// What is durable after a crash.
    fn read(&self) -> Option<u64>;
}

/// A disk that forgets what was not synced, and that can be told to lose more than that.
#[derive(Clone, Debug, Default)]
pub struct SimDisk {
    written: Option<u64>,
    durable: Option<u64>,
    /// The first value that ever became durable: what an old backup holds.
    oldest: Option<u64>,
    /// Pretends to sync.
    pub lies: bool,
}

impl SimDisk {
    pub fn wipe(&mut self) {
        *self = SimDisk { lies: self.lies, ..SimDisk::default() };
    }

    /// Puts an old backup back.
    pub fn roll_back(&mut self) {
        (self.written, self.durable) = (self.oldest, self.oldest);
    }

    /// Power is cut.
    pub fn crash(&mut self) {
        self.written = self.durable;
    }
}

impl Disk for SimDisk {
    fn write(&mut self, value: u64) {
        self.written = Some(value);
    }

    fn sync(&mut self) {
        if !self.lies {
            self.durable = self.written;
            self.oldest = self.oldest.or(self.durable);
        }
    }

    fn read(&self) -> Option<u64> {
        self.durable
    }
}
