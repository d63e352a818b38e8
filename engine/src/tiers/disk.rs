//! The disk tier's threads: one reads and one writes, so that a read never waits for a write, and the
//! thread that computes for neither.

use super::record::Damage;
use super::store::{DiskFile, ReadError, Scan, Store};
use cache::BlockHash;
use cache::tiers::{DiskSlot, HostSlot};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Something to do on the disk. Gets one [`DiskAnswer`].
#[derive(Debug)]
pub enum DiskJob {
    /// Look at what is there: the first job, once.
    Scan,
    /// Fill `buffer`, of the size of a payload.
    Read {
        name: BlockHash,
        from: DiskSlot,
        into: HostSlot,
        buffer: Vec<u8>,
    },
    Write {
        name: BlockHash,
        to: DiskSlot,
        payload: Arc<Vec<u8>>,
    },
}

#[derive(Debug)]
pub enum DiskAnswer {
    Scanned(io::Result<Scan>),
    /// `buffer` holds the block if `result` says so, and how long that took.
    Read {
        from: DiskSlot,
        into: HostSlot,
        buffer: Vec<u8>,
        result: Result<Duration, ReadError>,
    },
    Written {
        to: DiskSlot,
        result: io::Result<()>,
    },
}

/// Does jobs in its own time. The tiers' shell never waits for it.
pub trait Disk: Send {
    /// Takes a job. There are never more at once than the tiers' configuration says.
    fn submit(&mut self, job: DiskJob);
    /// The next answer that is there.
    fn poll(&mut self) -> Option<DiskAnswer>;
    /// Where it lies, for people.
    fn place(&self, slot: DiskSlot) -> String;
}

impl DiskJob {
    /// Does the job.
    pub fn run<F: DiskFile>(self, store: &Store<F>) -> DiskAnswer {
        match self {
            DiskJob::Scan => DiskAnswer::Scanned(store.scan()),
            DiskJob::Read { name, from, into, mut buffer } => {
                let began = Instant::now();
                let result = store.read(from, &name, &mut buffer).map(|()| began.elapsed());
                DiskAnswer::Read { from, into, buffer, result }
            }
            DiskJob::Write { name, to, payload } => {
                let result = store.write(to, &name, &payload);
                // Before the answer, so that the place can be written again without a copy.
                drop(payload);
                DiskAnswer::Written { to, result }
            }
        }
    }

    /// The answer if nobody can do it.
    fn failed(self) -> DiskAnswer {
        let gone = || io::Error::other("the thread of the disk tier has ended");
        match self {
            DiskJob::Scan => DiskAnswer::Scanned(Err(gone())),
            DiskJob::Read { from, into, buffer, .. } => {
                DiskAnswer::Read { from, into, buffer, result: Err(gone().into()) }
            }
            DiskJob::Write { to, .. } => DiskAnswer::Written { to, result: Err(gone()) },
        }
    }
}

/// Two threads over one store.
pub(super) struct DiskThreads {
    path: String,
    record_bytes: u64,
    reads: Option<SyncSender<DiskJob>>,
    writes: Option<SyncSender<DiskJob>>,
    answers: Receiver<DiskAnswer>,
    /// Of jobs that could not be handed over.
    failed: VecDeque<DiskAnswer>,
    threads: Vec<JoinHandle<()>>,
}

impl DiskThreads {
    /// Starts the threads; at most `jobs_max` jobs of each kind wait.
    pub fn spawn<F: DiskFile + 'static>(
        store: Store<F>,
        path: String,
        jobs_max: usize,
    ) -> io::Result<Self> {
        let record_bytes = store.format().record_bytes() as u64;
        let store = Arc::new(store);
        let (outbox, answers) = channel();
        let mut threads = Vec::new();
        let mut start = |name: &str, outbox: Sender<DiskAnswer>| {
            // One more than wait: the scan.
            let (jobs, inbox) = sync_channel::<DiskJob>(jobs_max + 1);
            let store = store.clone();
            let work = move || {
                for job in inbox {
                    if outbox.send(job.run(&store)).is_err() {
                        return;
                    }
                }
            };
            threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(work)?);
            io::Result::Ok(Some(jobs))
        };
        let reads = start("kv disk reads", outbox.clone())?;
        let writes = start("kv disk writes", outbox)?;
        let failed = VecDeque::new();
        Ok(DiskThreads { path, record_bytes, reads, writes, answers, failed, threads })
    }
}

impl Disk for DiskThreads {
    fn submit(&mut self, job: DiskJob) {
        let queue = match job {
            DiskJob::Scan | DiskJob::Read { .. } => &self.reads,
            DiskJob::Write { .. } => &self.writes,
        };
        let refused = match queue {
            Some(queue) => queue.try_send(job).map_err(|error| match error {
                std::sync::mpsc::TrySendError::Full(job) => job,
                std::sync::mpsc::TrySendError::Disconnected(job) => job,
            }),
            None => Err(job),
        };
        if let Err(job) = refused {
            self.failed.push_back(job.failed());
        }
    }

    fn poll(&mut self) -> Option<DiskAnswer> {
        self.failed.pop_front().or_else(|| self.answers.try_recv().ok())
    }

    fn place(&self, slot: DiskSlot) -> String {
        format!("{} at byte {}", self.path, u64::from(slot.0) * self.record_bytes)
    }
}

impl Drop for DiskThreads {
    /// Waits for what was begun: the file is nobody's afterwards.
    fn drop(&mut self) {
        (self.reads, self.writes) = (None, None);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What somebody who looks after the node should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A record that is no block; its place is used again.
    Damaged { place: String, damage: Damage },
    /// The disk refused something and is left alone for a while.
    Failed { doing: &'static str, place: String, error: String },
    /// The disk tier is off until the next start.
    Unusable { error: String },
    /// So many more of these that are not told one by one.
    More { findings: u64 },
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Finding::Damaged { place, damage } => {
                write!(f, "a cached block on disk is lost: {damage} ({place})")
            }
            Finding::Failed { doing, place, error } => write!(
                f,
                "the disk of cached blocks cannot be {doing} and is left alone for a while: {error} ({place})"
            ),
            Finding::Unusable { error } => {
                write!(f, "blocks are not cached on disk: {error}")
            }
            Finding::More { findings } => {
                write!(f, "{findings} more findings about the disk of cached blocks")
            }
        }
    }
}
