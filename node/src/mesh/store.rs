//! What a node knows of its mesh, on disk (redb): a crash at any write leaves the state before or after.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bincode::{Decode, Encode};
use protocol::NodeId;
use protocol::identity::join::Contact;
use protocol::identity::{
    Certificate, InviteId, InviteUse, RootId, SignedRevocation, SignedSet, Trust, UnixTime,
};
use protocol::wire;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use thiserror::Error;

/// Why the state cannot be used.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{} is in use: another node runs with this data directory", path.display())]
    InUse { path: PathBuf },
    #[error(
        "{} is damaged ({what}): move it away and join again with a token; the node keeps its key \
         and its id",
        path.display()
    )]
    Damaged { path: PathBuf, what: String },
    #[error("cannot use {}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("cannot write {}: {what}; what was stored before is unchanged", path.display())]
    Write { path: PathBuf, what: String },
}

/// The open file. One process at a time.
pub(crate) struct Store {
    path: PathBuf,
    /// What the database has open: it is opened anew from this, under the same lock.
    file: File,
    /// None after an error of the disk, until it could be opened again.
    database: Mutex<Option<Database>>,
}

/// What is stored of the mesh itself.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub trust: Trust,
    pub certificate: Certificate,
    pub contacts: Vec<Contact>,
}

#[derive(Encode, Decode)]
struct StoredWire {
    root: RootId,
    links: Vec<SignedSet>,
    revocations: Vec<SignedRevocation>,
    certificate: Certificate,
    contacts: Vec<Contact>,
}

impl Store {
    /// Opens the file, or makes it: whole under its name or not at all.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match options.open(path) {
            Ok(file) => Store::of(path, file),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let unfinished = path.with_extension("new");
                let file = options.create(true).mode(0o600).open(&unfinished);
                Store::make(path, &unfinished, file.map_err(|e| cannot_use(&unfinished, e))?)
            }
            Err(error) => Err(cannot_use(path, error)),
        }
    }

    /// Makes the database in a file that gets its name when it is one.
    fn make(path: &Path, unfinished: &Path, file: File) -> Result<Store, StoreError> {
        if file.try_lock().is_err() {
            return Err(StoreError::InUse { path: path.to_owned() });
        }
        // A start that did not come to its end has left something.
        file.set_len(0).map_err(|e| cannot_use(unfinished, e))?;
        let store = Store::of(path, file)?;
        // A link, unlike a renaming, never replaces a file.
        let linked = std::fs::hard_link(unfinished, path);
        let _ = std::fs::remove_file(unfinished);
        match linked {
            Ok(()) => Ok(store),
            // Another node was faster.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(StoreError::InUse { path: path.to_owned() })
            }
            Err(error) => Err(cannot_use(path, error)),
        }
    }

    fn of(path: &Path, file: File) -> Result<Store, StoreError> {
        let path = path.to_owned();
        match open_database(&file) {
            Ok(database) => Ok(Store { path, file, database: Mutex::new(Some(database)) }),
            Err(DatabaseError::DatabaseAlreadyOpen) => Err(StoreError::InUse { path }),
            Err(DatabaseError::Storage(redb::StorageError::Io(error)))
                if error.kind() == ErrorKind::StorageFull =>
            {
                Err(StoreError::Write { path, what: error.to_string() })
            }
            Err(error) => Err(StoreError::Damaged { path, what: error.to_string() }),
        }
    }

    /// The mesh, if the node belongs to one.
    pub fn mesh(&self, now: UnixTime) -> Result<Option<Stored>, StoreError> {
        let Some(bytes) = self.get(MESH_KEY).map_err(|e| self.damaged(&e))? else {
            return Ok(None);
        };
        let wire: StoredWire =
            wire::decode::<_, STORED_BYTES_MAX>(&bytes).map_err(|e| self.damaged(&e))?;
        let StoredWire { root, links, revocations, certificate, contacts } = wire;
        let trust = Trust::restore(root, links, revocations, now).map_err(|e| self.damaged(&e))?;
        Ok(Some(Stored { trust, certificate, contacts }))
    }

    pub fn set_mesh(&self, stored: &Stored) -> Result<(), StoreError> {
        let Stored { trust, certificate, contacts } = stored;
        let bytes = wire::encode(&StoredWire {
            root: trust.root(),
            links: trust.chain().links().to_vec(),
            revocations: trust.revocations().iter().cloned().collect(),
            certificate: certificate.clone(),
            contacts: contacts.clone(),
        });
        self.write(|transaction| {
            let mut table = transaction.open_table(STATE)?;
            table.insert(MESH_KEY, &bytes[..])?;
            Ok(())
        })
    }

    /// Every use of a token that is remembered.
    pub fn uses(&self) -> Result<Vec<InviteUse>, StoreError> {
        let read = |database: &Database| -> Result<Vec<InviteUse>, redb::Error> {
            let transaction = database.begin_read()?;
            let table = match transaction.open_table(USES) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            let mut uses = Vec::new();
            for entry in table.iter()? {
                let (key, expires) = entry?;
                let (id, node) = key.value();
                let (id, node) = (InviteId(id), NodeId(node));
                uses.push(InviteUse { id, node, expires: UnixTime(expires.value()) });
            }
            Ok(uses)
        };
        self.with(read).map_err(|e| self.damaged(&e))
    }

    /// Remembers uses; durable when this returns.
    pub fn add_uses(&self, uses: &[InviteUse]) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(USES)?;
            for used in uses {
                table.insert((used.id.0, used.node.0), used.expires.0)?;
            }
            Ok(())
        })
    }

    /// Forgets uses that the ledger has forgotten.
    pub fn retain_uses(&self, now: UnixTime, keep_s: u64) -> Result<(), StoreError> {
        let is_old = |used: &InviteUse| now > used.expires.plus(keep_s);
        if !self.uses()?.iter().any(is_old) {
            return Ok(());
        }
        self.write(|transaction| {
            let mut table = transaction.open_table(USES)?;
            table.retain(|_, expires| now <= UnixTime(expires).plus(keep_s))?;
            Ok(())
        })
    }

    /// Forgets the mesh and the tokens.
    pub fn clear(&self) -> Result<(), StoreError> {
        self.write(|transaction| {
            transaction.delete_table(STATE)?;
            transaction.delete_table(USES)?;
            Ok(())
        })
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, redb::Error> {
        self.with(|database| {
            let transaction = database.begin_read()?;
            let table = match transaction.open_table(STATE) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        })
    }

    fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let written = self.with(|database| {
            let transaction = database.begin_write()?;
            change(&transaction)?;
            // Durability::Immediate is the default: on the disk when this returns.
            transaction.commit()?;
            Ok(())
        });
        written.map_err(|e| StoreError::Write { path: self.path.clone(), what: e.to_string() })
    }

    /// Works on the database. After an error of the disk, as when it is full, redb refuses everything
    /// until the file is opened anew: that is done here, so that the node goes on when the disk does.
    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let mut place = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match place.take() {
            Some(database) => database,
            None => open_database(&self.file)?,
        };
        let done = work(&database);
        match &done {
            Err(redb::Error::Io(_) | redb::Error::PreviousIo) => {
                drop(database);
                *place = open_database(&self.file).ok();
                if place.is_none() {
                    // The lock that the database would hold.
                    let _ = self.file.try_lock();
                }
            }
            _ => *place = Some(database),
        }
        done
    }

    fn damaged(&self, what: &dyn std::fmt::Display) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what: what.to_string() }
    }
}

fn open_database(file: &File) -> Result<Database, DatabaseError> {
    let file = file.try_clone().map_err(redb::StorageError::from)?;
    Database::builder().create_file(file)
}

fn cannot_use(path: &Path, source: std::io::Error) -> StoreError {
    StoreError::Io { path: path.to_owned(), source }
}

const STATE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("state");
const USES: TableDefinition<'_, ([u8; 32], [u8; 32]), u64> = TableDefinition::new("uses");

/// The layout of `StoredWire` is part of the name: another layout gets another key.
const MESH_KEY: &str = "mesh 1";

const STORED_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn used(n: u8) -> InviteUse {
        InviteUse { id: InviteId([n; 32]), node: NodeId([n; 32]), expires: UnixTime(u64::MAX) }
    }

    #[test]
    fn goes_on_after_an_error_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.redb");
        let store = Store::open(&path).unwrap();
        store.add_uses(&[used(1)]).unwrap();
        let full = redb::Error::Io(ErrorKind::StorageFull.into());
        for error in [full, redb::Error::PreviousIo] {
            let failed = store.write(|transaction| {
                transaction.open_table(USES)?.insert(([7; 32], [7; 32]), 7)?;
                Err(error)
            });
            assert!(matches!(failed, Err(StoreError::Write { .. })), "{failed:?}");
            let uses = store.uses().unwrap();
            assert!(uses.len() == 1 && uses[0].node == NodeId([1; 32]), "{uses:?}");
            assert!(matches!(Store::open(&path), Err(StoreError::InUse { .. })));
        }
        store.add_uses(&[used(2)]).unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap().uses().unwrap().len(), 2);
    }
    #[test]
    fn a_start_that_was_cut_off_leaves_nothing_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mesh.redb");
        std::fs::write(dir.path().join("mesh.new"), [0; 4096]).unwrap();
        let store = Store::open(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::InUse { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        store.add_uses(&[used(1)]).unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap().uses().unwrap().len(), 1);
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Damaged { .. })));
    }
}
