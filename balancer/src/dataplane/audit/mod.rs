//! The truth check: the counts of the kernel half compared with the socket table, and put right where they stay wrong.

pub mod adopt;
pub mod handover;
pub mod migrated;
pub mod socket_table;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;
use balancer_common::abi::{AuditTotals, Backend, BackendState, Connection, Counts};
use tracing::{info, warn};

use self::socket_table::SocketTable;
use super::tables::{SlotView, connection_of};
use super::writer::Writer;
use crate::sys::sock_diag::Socket;
use crate::sys::{clock, memory};

/// So many comparisons in a row must find a count off before that is more than a socket on its way.
const LASTING: u32 = 3;

/// So many connections take megabytes while they are compared, which the process must not keep until the next time.
const MANY: usize = 10_000;

/// By how much a count is too low (or, negative, too high), as far as the table can tell while connections come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    least: i64,
    most: i64,
}

impl Drift {
    /// From a count before and after the table was read, how many connections were counted as entering meanwhile, and how many the
    /// table has. A connection that came or went meanwhile may or may not be in the table.
    pub fn between(before: u32, after: u32, entered: u64, found: u32) -> Self {
        let (before, after, found) = (i64::from(before), i64::from(after), i64::from(found));
        let entered = i64::try_from(entered).unwrap_or(i64::MAX / 2);
        Self {
            least: found - (before + entered).max(after),
            most: found - (after - entered).min(before),
        }
    }

    /// Whether there may be none.
    pub const fn may_be_none(self) -> bool {
        self.least <= 0 && self.most >= 0
    }

    /// What lasts of it if a later comparison has found `later`: what both allow or, where it grows or shrinks meanwhile, the
    /// smaller one of the two, unless they are off to different sides.
    fn lasting(self, later: Self) -> Option<Self> {
        let both = Self {
            least: self.least.max(later.least),
            most: self.most.min(later.most),
        };
        if both.least <= both.most {
            return Some(both);
        }
        let (before, after) = (self.at_least(), later.at_least());
        let smaller = if before.abs() < after.abs() {
            self
        } else {
            later
        };
        (before.signum() == after.signum()).then_some(smaller)
    }

    /// The smallest that it can be: never more than what is really off.
    const fn at_least(self) -> i64 {
        if self.least > 0 {
            self.least
        } else {
            self.most
        }
    }
}

/// A count that the last comparisons found off.
#[derive(Clone, Copy, Debug)]
struct Deviation {
    generation: u32,
    drift: Drift,
    checks: u32,
}

impl Deviation {
    /// The suspect after one more comparison.
    fn seen_again(before: Option<Self>, generation: u32, drift: Drift) -> Self {
        let first = Self {
            generation,
            drift,
            checks: 1,
        };
        let Some(before) = before.filter(|before| before.generation == generation) else {
            return first;
        };
        before.drift.lasting(drift).map_or(first, |drift| Self {
            generation,
            drift,
            checks: before.checks + 1,
        })
    }

    const fn is_lasting(&self) -> bool {
        self.checks >= LASTING
    }
}

/// The two counts of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Count {
    Established,
    Exempt,
}

/// What the comparisons have found so far. One comparison goes over all guarded namespaces, one after the other.
#[derive(Debug, Default)]
pub struct Audit {
    audit_totals: AuditTotals,
    last: Pass,
    this: Pass,
    /// Listeners that can't be registered, by their cookie, and when that is tried again.
    pub(in crate::dataplane) unadoptable: HashMap<u64, Instant>,
}

/// What one comparison saw that may be a socket on its way: only what the next one sees again is so.
#[derive(Debug, Default)]
pub(in crate::dataplane) struct Pass {
    /// Counts that were off.
    deviations: BTreeMap<(u32, Count), Deviation>,
    /// Connections with a slot that are not counted, by their cookie, and how many comparisons in a row have seen them so.
    uncounted: HashMap<u64, u64>,
    /// Slots whose listener was not there.
    deserted: HashSet<(u32, u32)>,
    /// Listeners that nobody has registered, by their cookie.
    pub(in crate::dataplane) unregistered: HashSet<u64>,
    /// How many listeners of each service lack a slot.
    without_slot: BTreeMap<u16, u64>,
    /// What the kernel half said of that before.
    without_slot_before: BTreeMap<u16, u64>,
    drift: u64,
    /// There are adopted backends, or connections that only the daemon counts.
    adopted: bool,
}

impl Pass {
    /// A listener of that service lacks a slot.
    pub(in crate::dataplane) fn lacks_slot(&mut self, service: u16) {
        *self.without_slot.entry(service).or_insert(0) += 1;
    }
}

impl Audit {
    /// Goes on from what an earlier daemon has found.
    pub fn of(audit_totals: AuditTotals) -> Self {
        Self {
            audit_totals,
            ..Self::default()
        }
    }

    /// Whether the comparison before this one saw that listener unregistered.
    pub(in crate::dataplane) fn was_unregistered(&self, cookie: u64) -> bool {
        self.last.unregistered.contains(&cookie)
    }

    pub(in crate::dataplane) fn saw(&mut self) -> &mut Pass {
        &mut self.this
    }
}

impl Writer {
    /// Begins a comparison.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn begin_check(&mut self) -> Result<()> {
        let before = self
            .service_ids()?
            .into_values()
            .map(|id| (id, self.tables.unregistered_word(id).load(Ordering::SeqCst)))
            .collect();
        self.audit.this = Pass {
            without_slot_before: before,
            ..Pass::default()
        };
        Ok(())
    }

    /// Compares one namespace: registers listeners that nobody has registered (where `eager`, at first sight), closes slots whose
    /// listeners are gone, and puts counts right that stay wrong. Must run inside that namespace.
    ///
    /// # Errors
    /// When the socket table or a map can't be read.
    pub fn check(&mut self, netns: u64, eager: bool) -> Result<()> {
        let mut socket_table = self.socket_table(netns)?;
        let adopted = self.adopt(netns, &socket_table, eager)?;
        if adopted {
            socket_table = self.socket_table(netns)?;
        }
        if self.inherit(&socket_table)? {
            socket_table = self.socket_table(netns)?;
        }
        if self.follow_migrated(netns, &socket_table)? {
            socket_table = self.socket_table(netns)?;
        }
        self.close_deserted(&socket_table);
        let tally = self.tally(&socket_table);
        self.compare(&socket_table, &tally);
        self.note_unseen(&socket_table, &tally);
        self.recount(&socket_table, tally)?;
        if socket_table.connections.len() >= MANY {
            drop(socket_table);
            memory::give_back();
        }
        Ok(())
    }

    /// Whether the last comparison saw something that only the next one can tell from a socket on its way.
    pub fn is_in_doubt(&self) -> bool {
        let last = &self.audit.last;
        !(last.deviations.is_empty() && last.uncounted.is_empty() && last.deserted.is_empty())
    }

    /// Whether the last comparison saw backends or connections that the kernel half does not see go.
    pub const fn has_adopted(&self) -> bool {
        self.audit.last.adopted
    }

    /// Ends a comparison that took so much processor time; returns what is known now.
    pub fn end_check(&mut self, cost: Duration) -> AuditTotals {
        let this = std::mem::take(&mut self.audit.this);
        for (service, before) in &this.without_slot_before {
            let now = this.without_slot.get(service).copied().unwrap_or(0);
            // Where the kernel half has just found another one, the next comparison tells.
            let _ = self.tables.unregistered_word(*service).compare_exchange(
                *before,
                now,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
        }
        self.audit
            .unadoptable
            .retain(|cookie, _| this.unregistered.contains(cookie));
        let audit_totals = &mut self.audit.audit_totals;
        audit_totals.checks += 1;
        audit_totals.drift = this.drift;
        audit_totals.last_ns = clock::monotonic_ns();
        audit_totals.cost_ns = u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX);
        self.tables.set_audit_totals(*audit_totals);
        self.audit.last = this;
        *audit_totals
    }

    /// Closes what is left of a namespace that is gone, with all its sockets.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn drop_netns(&mut self, netns: u64) -> Result<()> {
        self.migrated.remove(&netns);
        for view in self.slots()? {
            if view.member.backend.netns != netns {
                continue;
            }
            self.close(&view);
            self.tables
                .adopted_word(view.slot())
                .store(0, Ordering::SeqCst);
            let word = self.tables.established_word(view.slot());
            let left = word.swap(0, Ordering::SeqCst);
            if left != 0 {
                self.audit.audit_totals.repairs += 1;
                warn!(
                    "{}: {} connections were counted on it still when its network namespace was gone: put right",
                    name(&view),
                    left & u64::from(u32::MAX)
                );
            }
        }
        Ok(())
    }

    /// A listener that closes is seen by the kernel half, but for adopted ones and where another program switches that off.
    fn close_deserted(&mut self, socket_table: &SocketTable) {
        let named: HashSet<(u32, u32)> = socket_table
            .listeners
            .iter()
            .filter_map(connection_of)
            .map(|connection| (u32::from(connection.slot), connection.generation))
            .collect();
        for view in &socket_table.slots {
            let tenant = (view.slot(), view.slot_state().generation());
            if !view.slot_state().is(BackendState::Active) || named.contains(&tenant) {
                continue;
            }
            if self.audit.last.deserted.contains(&tenant) {
                info!("{}: its listener is gone", name(view));
                self.close(view);
            } else {
                self.audit.this.deserted.insert(tenant);
            }
        }
    }

    /// Sorts the connections of a census.
    fn tally<'a>(&mut self, socket_table: &'a SocketTable) -> Tally<'a> {
        let generations: HashMap<u32, u32> = socket_table
            .slots
            .iter()
            .map(|view| (view.slot(), view.slot_state().generation()))
            .collect();
        let mut tally = Tally::default();
        for socket in &socket_table.connections {
            let tenant = connection_of(socket).filter(|connection| {
                generations.get(&u32::from(connection.slot)) == Some(&connection.generation)
            });
            match tenant.or_else(|| self.inherited(socket, &generations)) {
                None => tally.strangers.push(socket),
                Some(connection) if connection.class == Connection::INHERITED => {
                    let slot = u32::from(connection.slot);
                    tally.uncounted.push((slot, socket));
                }
                Some(connection) if connection.class == Connection::UNCOUNTED => {
                    // On its way out, unless it stays so: then another program has switched its state changes off.
                    let slot = u32::from(connection.slot);
                    let before = self.audit.last.uncounted.get(&socket.cookie);
                    let before = before.copied().unwrap_or(0);
                    if before > 0 {
                        tally.uncounted.push((slot, socket));
                    }
                    if before == 1 {
                        *tally.unseen.entry(slot).or_default() += 1;
                    }
                    self.audit.this.uncounted.insert(socket.cookie, before + 1);
                }
                Some(connection) => {
                    let found = tally.found.entry(u32::from(connection.slot)).or_default();
                    found.0 += 1;
                    found.1 += u32::from(connection.class == Connection::EXEMPT);
                }
            }
        }
        tally
    }

    fn compare(&mut self, socket_table: &SocketTable, tally: &Tally<'_>) {
        for (index, view) in socket_table.slots.iter().enumerate() {
            let (before, after) = (socket_table.before[index], socket_table.after[index]);
            if before.generation != after.generation {
                continue;
            }
            let entered = after.entered.wrapping_sub(before.entered);
            let found = tally.found.get(&view.slot()).copied().unwrap_or_default();
            let drift = |count: fn(&Counts) -> u32, found| {
                Drift::between(count(&before.counts), count(&after.counts), entered, found)
            };
            let established = drift(Counts::established, found.0);
            let exempt = drift(Counts::exempt, found.1);
            let established = self.lasting(view, Count::Established, established);
            let exempt = self.lasting(view, Count::Exempt, exempt);
            if established != 0 || exempt != 0 {
                self.repair(view, established, exempt, found.0);
            }
        }
    }

    /// By how much a count has been off for long enough; 0: it may be right.
    fn lasting(&mut self, view: &SlotView, count: Count, drift: Drift) -> i64 {
        let key = (view.slot(), count);
        if drift.may_be_none() {
            return 0;
        }
        let before = self.audit.last.deviations.get(&key).copied();
        let deviation = Deviation::seen_again(before, view.slot_state().generation(), drift);
        if deviation.is_lasting() {
            return deviation.drift.at_least();
        }
        self.audit.this.deviations.insert(key, deviation);
        0
    }

    fn repair(&mut self, view: &SlotView, established: i64, exempt: i64, found: u32) {
        let change = established
            .cast_unsigned()
            .wrapping_add(exempt.cast_unsigned() << 32);
        self.tables
            .established_word(view.slot())
            .fetch_add(change, Ordering::SeqCst);
        self.audit.audit_totals.repairs += 1;
        self.audit.this.drift += established.unsigned_abs().max(exempt.unsigned_abs());
        warn!(
            "{}: the socket table has {found} connections, {established:+} ({exempt:+} exempt) against the count, for \
             {LASTING} comparisons now: put right. Another sock_ops program may switch state changes off (`balancer doctor` names them)",
            name(view)
        );
    }

    /// Connections whose entry the kernel half didn't see are counted from the socket table from now on, which puts a count right, too.
    fn note_unseen(&mut self, socket_table: &SocketTable, tally: &Tally<'_>) {
        for view in &socket_table.slots {
            let Some(unseen) = tally.unseen.get(&view.slot()) else {
                continue;
            };
            self.audit.audit_totals.repairs += 1;
            self.audit.this.drift += unseen;
            warn!(
                "{}: the socket table has {unseen:+} connections that came unseen: put right, they are counted from it from now on. \
                 Another sock_ops program may switch state changes off (`balancer doctor` names them)",
                name(view)
            );
        }
    }

    /// Counts again what the kernel half can't follow.
    fn recount(&mut self, socket_table: &SocketTable, tally: Tally<'_>) -> Result<()> {
        let adopted: Vec<&SlotView> = socket_table
            .slots
            .iter()
            .filter(|view| view.member.backend.flags & Backend::ADOPTED != 0)
            .collect();
        let mut shares = self.shares(&adopted, &tally.strangers)?;
        self.audit.this.adopted |= !(adopted.is_empty() && tally.uncounted.is_empty());
        let service = |slot| {
            let of_slot = |view: &&SlotView| view.slot() == slot;
            socket_table
                .slots
                .iter()
                .find(of_slot)
                .map(|view| view.member.backend.service)
        };
        for (slot, socket) in tally.uncounted {
            if let Some(service) = service(slot) {
                *shares.entry(slot).or_insert(0) += self.share(service, socket)?;
            }
        }
        for view in &socket_table.slots {
            let count = shares.get(&view.slot()).copied().unwrap_or(0);
            let word = self.tables.adopted_word(view.slot());
            if word.load(Ordering::Acquire) != count {
                word.store(count, Ordering::SeqCst);
            }
        }
        Ok(())
    }

    /// What a connection adds to a count, as `Counts::established` packs it.
    pub(in crate::dataplane) fn share(&self, service: u16, socket: &Socket) -> Result<u64> {
        let exempt = self.tables.is_exempt(service, socket.remote.ip())?;
        Ok(if exempt { Counts::ONE_EXEMPT } else { 1 })
    }
}

/// The connections of a namespace, sorted.
#[derive(Debug, Default)]
struct Tally<'a> {
    /// Those that the kernel half has counted, all and exempt ones, by slot.
    found: BTreeMap<u32, (u32, u32)>,
    /// Those that name a slot but are not counted.
    uncounted: Vec<(u32, &'a Socket)>,
    /// How many of these have just turned out to stay so, by slot.
    unseen: BTreeMap<u32, u64>,
    /// Those that name no slot.
    strangers: Vec<&'a Socket>,
}

/// How a log calls a backend.
fn name(view: &SlotView) -> String {
    let backend = &view.member.backend;
    let address = std::net::SocketAddr::new(backend.address.into(), backend.port);
    format!("backend {address} (slot {})", view.slot())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drift(least: i64, most: i64) -> Drift {
        Drift { least, most }
    }

    #[test]
    fn a_quiet_slot_is_compared_exactly() {
        assert_eq!(Drift::between(7, 7, 0, 7), drift(0, 0));
        assert_eq!(Drift::between(7, 7, 0, 5), drift(-2, -2));
        assert!(!Drift::between(7, 7, 0, 8).may_be_none());
    }

    #[test]
    fn only_what_lasts_is_drift() {
        let off = drift(2, 5);
        let first = Deviation::seen_again(None, 1, off);
        let second = Deviation::seen_again(Some(first), 1, drift(1, 3));
        assert!(!second.is_lasting());
        let third = Deviation::seen_again(Some(second), 1, drift(3, 9));
        assert!(third.is_lasting());
        assert_eq!(third.drift.at_least(), 3);
        let grown = Deviation::seen_again(Some(second), 1, drift(7, 9));
        assert_eq!((grown.is_lasting(), grown.drift), (true, drift(2, 3)));
        let shrunk = Deviation::seen_again(Some(second), 1, drift(1, 1));
        assert_eq!((shrunk.is_lasting(), shrunk.drift), (true, drift(1, 1)));
        let elsewhere = Deviation::seen_again(Some(second), 1, drift(-4, -1));
        assert_eq!((elsewhere.checks, elsewhere.drift), (1, drift(-4, -1)));
        let other_tenant = Deviation::seen_again(Some(second), 2, off);
        assert_eq!(other_tenant.checks, 1);
    }

    #[test]
    fn a_drift_that_grows_is_put_right_by_what_has_lasted() {
        for side in [1, -1] {
            let seen = [10, 20, 30].map(|off| drift(side * off - 2, side * off + 2));
            let last = seen.into_iter().fold(None, |before, drift| {
                Some(Deviation::seen_again(before, 1, drift))
            });
            let last = last.expect("three were seen");
            assert_eq!((last.is_lasting(), last.drift.at_least()), (true, side * 8));
        }
    }

    proptest! {
        /// However many come and go while the table is read, and whichever of them it shows: a count that is right is never
        /// suspected, and one that is wrong never by more than it is.
        #[test]
        fn the_true_drift_is_within_the_bounds(
            standing in 0..1_000_u32, entered in 0..200_u32, left in 0..200_u32, shown in 0..400_u32, off in -50..50_i64,
        ) {
            let left = left.min(standing + entered);
            let counted = |audit_totals: u32| u32::try_from((i64::from(audit_totals) + off).max(0)).unwrap();
            prop_assume!(i64::from(standing) + off >= 0 && i64::from(standing + entered - left) + off >= 0);
            // Those that stood throughout are in the table, and of the rest some.
            let throughout = standing.saturating_sub(left);
            let found = throughout + shown.min(standing - throughout + entered);
            let drift = Drift::between(counted(standing), counted(standing + entered - left), entered.into(), found);
            prop_assert!(drift.least <= -off && -off <= drift.most, "{drift:?} {off}");
        }
    }
}
