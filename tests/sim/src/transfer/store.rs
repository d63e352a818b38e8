//! One node's pool with the bytes of its blocks, and who is writing or reading them at the moment.
//! Writes and reads take time; between their beginning and end a page is torn, or must not change.

use cache::{BlockHash, BlockId, BlockPool, Lookup};
use protocol::TenantId;

use super::ledger::Ledger;
use super::model::Content;

pub struct Store {
    pub pool: BlockPool,
    pages: Vec<Page>,
    broken: Ledger,
    node: u32,
}

#[derive(Clone, Debug, Default)]
struct Page {
    bytes: Content,
    /// Whose tokens these bytes come from; travels beside the bytes where no machine sees it.
    tenant: Option<TenantId>,
    being_written: bool,
    readers: u32,
}

impl Store {
    pub fn new(capacity: u32, node: u32, broken: Ledger) -> Self {
        let pages = vec![Page::default(); capacity as usize];
        Store { pool: BlockPool::new(capacity), pages, broken, node }
    }

    pub fn begin_write(&mut self, block: BlockId) {
        let page = &mut self.pages[block.0 as usize];
        if page.being_written {
            self.broken.broken(self.node, format_args!("two write block {} at once", block.0));
        }
        if page.readers > 0 {
            self.broken.broken(self.node, format_args!("block {} is written while read", block.0));
        }
        if !self.pool.is_writable(block) {
            self.broken.broken(self.node, format_args!("block {} is not its writer's", block.0));
        }
        (page.being_written, page.bytes, page.tenant) = (true, TORN, None);
    }

    pub fn end_write(&mut self, block: BlockId, bytes: Content, tenant: TenantId) {
        let page = &mut self.pages[block.0 as usize];
        if !page.being_written || !self.pool.is_writable(block) {
            self.broken.broken(self.node, format_args!("block {} changed hands", block.0));
        }
        (page.being_written, page.bytes, page.tenant) = (false, bytes, Some(tenant));
    }

    pub fn begin_read(&mut self, block: BlockId) {
        let page = &mut self.pages[block.0 as usize];
        if page.being_written {
            self.broken.broken(self.node, format_args!("block {} is read while written", block.0));
        }
        page.readers += 1;
    }

    /// What was read, and whose it is.
    pub fn end_read(&mut self, block: BlockId) -> (Content, Option<TenantId>) {
        let page = &mut self.pages[block.0 as usize];
        page.readers -= 1;
        if page.being_written || self.pool.references(block) == 0 {
            self.broken.broken(self.node, format_args!("block {} was freed while read", block.0));
        }
        (page.bytes, page.tenant.clone())
    }

    /// What a sequence of `tenant` reads when it decodes: a whole, committed block of its own tenant.
    pub fn read(&self, block: BlockId, name: &BlockHash, tenant: &TenantId) -> Content {
        let page = &self.pages[block.0 as usize];
        if page.being_written || self.pool.lookup(name) != Lookup::Ready(block) {
            self.broken.broken(self.node, format_args!("block {} is read uncommitted", block.0));
        }
        self.check_tenant(block, tenant);
        page.bytes
    }

    pub fn check_tenant(&self, block: BlockId, tenant: &TenantId) {
        let theirs = &self.pages[block.0 as usize].tenant;
        if theirs.as_ref() != Some(tenant) {
            let text = format_args!("block {} of {theirs:?} in a sequence of {tenant}", block.0);
            self.broken.broken(self.node, text);
        }
    }

    /// Writes at once, as a forward pass does.
    pub fn fill(&mut self, block: BlockId, bytes: Content, tenant: &TenantId) {
        self.begin_write(block);
        self.end_write(block, bytes, tenant.clone());
    }

    /// Gives back the blocks of a sequence, its end first.
    pub fn release(&mut self, blocks: impl DoubleEndedIterator<Item = BlockId>) {
        for block in blocks.rev() {
            self.pool.release(block);
        }
    }
}

/// What a page holds while it is written.
const TORN: Content = [0xee; 32];
