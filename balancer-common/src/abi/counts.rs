//! The numbers of a slot.

use super::backend::SlotPolicy;

/// Value of COUNTS: the live numbers of a slot, each word atomic. Ticks are whole: what is past
/// stays past, however long nobody writes the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// established | exempt established << 32. Exact: changed on entering and on leaving
    /// ESTABLISHED alone.
    pub established: u64,
    /// SYNs sent here that have not become established (20 bits with a sign) | tick of the last
    /// << 20. A hint for the order of candidates.
    pub expected: u64,
    /// For how many ticks the accept queue had been full (20 bits) when it was last seen so | tick
    /// of that << 20; 0: not full.
    pub full: u64,
    /// [`Cookies`] | tick until which they are in use << 2.
    pub cookies: u64,
    /// Tick from when on the half-open connections, which hold all the room, are a flood unless
    /// one is completed before; 0: they hold it not.
    pub flood: u64,
    /// The longest handshake of late, in microseconds (20 bits: a second is more than is asked
    /// for) | tick when it was completed << 20; 0: none yet.
    pub handshake: u64,
}

impl Counts {
    /// Nothing counted.
    pub const ZERO: Self = Self {
        established: 0,
        expected: 0,
        full: 0,
        cookies: 0,
        flood: 0,
        handshake: 0,
    };
    /// What one exempt connection adds to the word `established`; any other adds 1.
    pub const ONE_EXEMPT: u64 = 1 << 32 | 1;

    /// These numbers together with the connections that only the daemon can count.
    #[inline(always)]
    #[must_use]
    pub const fn with_adopted(self, policy: &SlotPolicy) -> Self {
        Self {
            established: self.established.wrapping_add(policy.adopted),
            ..self
        }
    }

    /// Connections in ESTABLISHED.
    #[inline(always)]
    pub const fn established(&self) -> u32 {
        self.established as u32
    }

    /// Exempt connections in ESTABLISHED; [`Self::established`] has them, too.
    #[inline(always)]
    pub const fn exempt(&self) -> u32 {
        (self.established >> 32) as u32
    }
}

/// How sure it is that a listener answers with SYN cookies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Cookies {
    /// Not in use.
    Off = 0,
    /// The SYN queue is nearly full: the next SYN may be answered with a cookie.
    Soon = 1,
    /// In use: one was sent in the last two minutes, or `tcp_syncookies` is 2.
    InUse = 2,
}

/// Value of TOTALS: what only ever grows, apart from COUNTS, which every SYN reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Totals {
    /// Connections that have entered ESTABLISHED, of all backends that the slot has had. Raised
    /// after COUNTS. Atomic.
    pub entered: u64,
}
