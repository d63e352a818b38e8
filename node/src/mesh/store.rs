//! What a node knows of its mesh, on disk (redb): a crash at any write leaves the state before or after.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

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
    database: Database,
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
    /// Opens the file, or makes it.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let io = |source| StoreError::Io { path: path.to_owned(), source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        let path = path.to_owned();
        let database = match Database::builder().create_file(file) {
            Ok(database) => database,
            Err(DatabaseError::DatabaseAlreadyOpen) => return Err(StoreError::InUse { path }),
            Err(error) => return Err(StoreError::Damaged { path, what: error.to_string() }),
        };
        Ok(Store { path, database })
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
        let read = || -> Result<Vec<InviteUse>, redb::Error> {
            let transaction = self.database.begin_read()?;
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
        read().map_err(|e| self.damaged(&e))
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
        let transaction = self.database.begin_read()?;
        let table = match transaction.open_table(STATE) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(table.get(key)?.map(|value| value.value().to_vec()))
    }

    fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), redb::Error>,
    ) -> Result<(), StoreError> {
        let written = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            change(&transaction)?;
            // Durability::Immediate is the default: on the disk when this returns.
            transaction.commit()?;
            Ok(())
        };
        written().map_err(|e| StoreError::Write { path: self.path.clone(), what: e.to_string() })
    }

    fn damaged(&self, what: &dyn std::fmt::Display) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what: what.to_string() }
    }
}

const STATE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("state");
const USES: TableDefinition<'_, ([u8; 32], [u8; 32]), u64> = TableDefinition::new("uses");

/// The layout of `StoredWire` is part of the name: another layout gets another key.
const MESH_KEY: &str = "mesh 1";

const STORED_BYTES_MAX: usize = 1 << 20;
