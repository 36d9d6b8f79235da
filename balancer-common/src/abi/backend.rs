//! Backends: who is in a slot, what the daemon wants of it, and the connections that name it.

use super::address::Address;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum BackendState {
    /// Nothing; may be claimed.
    Free = 0,
    /// Being filled by the CPU that claimed it.
    Claimed = 1,
    /// Listens. Whether the daemon has confirmed it is a matter of its flags and policy.
    Active = 2,
    /// The listener is gone, its connections are not (or were not when last looked at).
    Closed = 3,
    /// Listens in a netns that the daemon has not confirmed. Never stored: derived.
    Candidate = 4,
    /// Being changed by the daemon. If it dies over that, the next one finishes what it began.
    Held = 5,
}

impl BackendState {
    /// The word in JSON and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Claimed => "claimed",
            Self::Active => "active",
            Self::Closed => "closed",
            Self::Candidate => "candidate",
            Self::Held => "held",
        }
    }
}

/// Which backend: a slot, and its generation while this backend has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId {
    /// The slot: the backend's index in every map by slot.
    pub slot: u32,
    /// The slot's generation, raised when the slot is freed.
    pub generation: u32,
}

impl BackendId {
    /// Packs the two into one word.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        (self.generation as u64) << 32 | self.slot as u64
    }

    /// The two that a word packs.
    #[inline(always)]
    pub const fn unpack(word: u64) -> Self {
        Self {
            slot: word as u32,
            generation: (word >> 32) as u32,
        }
    }
}

/// The first word of a [`Backend`]: generation and state, changed by compare-and-swap alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotState(pub u64);

impl SlotState {
    /// Packs the two.
    #[inline(always)]
    pub const fn new(generation: u32, state: BackendState) -> Self {
        Self((generation as u64) << 32 | state as u64)
    }

    /// Tells the backends apart that have the slot one after the other: raised when it is freed.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Whether the slot is in a state.
    #[inline(always)]
    pub const fn is(self, state: BackendState) -> bool {
        self.0 as u32 == state as u32
    }

    /// The state, a number that no one writes being free.
    pub const fn state(self) -> BackendState {
        match self.0 as u32 {
            1 => BackendState::Claimed,
            2 => BackendState::Active,
            3 => BackendState::Closed,
            5 => BackendState::Held,
            _ => BackendState::Free,
        }
    }

    /// The same backend in another state.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, state: BackendState) -> Self {
        Self::new(self.generation(), state)
    }
}

/// Value of BACKENDS: who a slot is. Written by the kernel when it is claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Backend {
    /// [`SlotState`], atomic.
    pub slot_state: u64,
    /// Cookie of the netns that the socket is in.
    pub netns: u64,
    /// The address that it is bound to.
    pub address: Address,
    /// The port that it is bound to, host byte order.
    pub port: u16,
    /// Id of the service that it serves.
    pub service: u16,
    /// Weight by the listen rule, until the daemon writes another to POLICY.
    pub weight: u32,
    /// User id of the socket's owner.
    pub uid: u32,
    /// Index of the interface that it is bound to, 0 for none.
    pub device: u32,
    /// Bits of `Backend::…`.
    pub flags: u32,
    /// errno of `bpf_sock_map_update` when it is [`Backend::UNSTEERABLE`] (a positive number).
    pub map_error: u32,
    /// The process that listened (thread group id in the initial pid namespace), 0 if not known.
    pub pid: u32,
    /// The thread of that process that listened: a thread can be in another netns than its process.
    /// 0 if not known.
    pub tid: u32,
    /// Id of the cgroup that the socket was made in, 0 if not known.
    pub cgroup: u64,
}

impl Backend {
    /// An IPv6 socket.
    pub const V6: u32 = 1;
    /// An IPv6 socket that takes no IPv4.
    pub const V6_ONLY: u32 = 2;
    /// Refused by the SOCKMAP (MPTCP): counted and, on its own port, admitted, but never steered
    /// to.
    pub const UNSTEERABLE: u32 = 4;
    /// Claimed by a rule for any netns.
    pub const CANDIDATE: u32 = 8;
    /// Registered by the daemon: it listened before, and may have connections that the kernel half
    /// does not count. The kernel half does not see it close.
    pub const ADOPTED: u32 = 16;

    /// An empty slot.
    pub const EMPTY: Self = Self {
        slot_state: 0,
        netns: 0,
        address: Address::ANY,
        port: 0,
        service: 0,
        weight: 0,
        uid: 0,
        device: 0,
        flags: 0,
        map_error: 0,
        pid: 0,
        tid: 0,
        cgroup: 0,
    };

    /// Generation and stored state.
    #[inline(always)]
    pub const fn slot_state(&self) -> SlotState {
        SlotState(self.slot_state)
    }

    /// Whether a backend with these flags may be anybody's: a rule for any netns has claimed its
    /// slot, and the daemon has not confirmed it by giving it a quota. That is asked last.
    #[inline(always)]
    pub fn is_strangers(flags: u32, is_confirmed: impl FnOnce() -> bool) -> bool {
        flags & Self::CANDIDATE != 0 && !is_confirmed()
    }
}

/// Value of POLICY: what the daemon wants and knows of a slot. Each word is written atomically;
/// quota and weight are valid for one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SlotPolicy {
    /// quota | (generation + 1) << 32; 0 in the upper half: never written.
    pub quota: u64,
    /// weight | flags << 32.
    pub weight: u64,
    /// Connections that only the daemon can count, as `Counts::established` packs them: those that
    /// were there before their listener was registered, and those whose state changes another
    /// program has switched off. It counts them again at each check until they are gone.
    pub adopted: u64,
    /// The quota of the server that the backend is a listener of, which its listeners share: each
    /// has a part of it in `quota`; and the slot of the first of them << 32. Valid for the same
    /// generation. The kernel half does not read it.
    pub server: u64,
}

impl SlotPolicy {
    /// The quota was set by hand for this backend (a flag of the weight word).
    pub const BY_HAND: u32 = 1;
    /// The quota was set by hand for every backend of the service.
    pub const SERVICE_BY_HAND: u32 = 2;
    /// The quota was computed from what is known of the clients, and so is only as good as that.
    pub const COMPUTED: u32 = 4;
    /// Somebody closed the server: the quota of the whole was set to 0 by hand. Without it a quota
    /// of 0 is a listener's part of one that is not.
    pub const CLOSED: u32 = 8;
    /// Its connections are to be moved away.
    pub const DRAINED: u32 = 16;

    /// Packs quota and weight for the backend with that generation.
    pub const fn new(generation: u32, quota: u32, weight: u32, flags: u32) -> Self {
        Self {
            quota: (generation.wrapping_add(1) as u64) << 32 | quota as u64,
            weight: (flags as u64) << 32 | weight as u64,
            adopted: 0,
            server: 0,
        }
    }

    /// The same as a part of the quota of a server whose first listener is in that slot.
    #[must_use]
    pub const fn of_server(self, first_slot: u32, quota: u32) -> Self {
        Self {
            server: (first_slot as u64) << 32 | quota as u64,
            ..self
        }
    }

    /// The quota of the server, for the generation that [`Self::is_for`] tells.
    pub const fn server_quota(&self) -> u32 {
        self.server as u32
    }

    /// The slot of the server's first listener, for the generation that [`Self::is_for`] tells.
    pub const fn first_slot(&self) -> u32 {
        (self.server >> 32) as u32
    }

    /// Whether the daemon wrote it for this backend.
    #[inline(always)]
    pub const fn is_for(&self, slot_state: SlotState) -> bool {
        (self.quota >> 32) as u32 == slot_state.generation().wrapping_add(1)
    }

    /// The quota, for the generation that [`Self::is_for`] tells.
    #[inline(always)]
    pub const fn quota(&self) -> u32 {
        self.quota as u32
    }

    /// The weight, for the generation that [`Self::is_for`] tells.
    #[inline(always)]
    pub const fn weight(&self) -> u32 {
        self.weight as u32
    }

    /// Where the quota comes from: bits of `SlotPolicy::…`.
    #[inline(always)]
    pub const fn flags(&self) -> u32 {
        (self.weight >> 32) as u32
    }
}

/// Value of CONNECTION (socket storage): on a listener its slot; on an accepted socket what it was
/// counted as.
///
/// Its size and the places of slot and generation are the same in every layout, so that another
/// build can tell whose a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Connection {
    /// The slot of the listener.
    pub slot: u16,
    /// `Connection::…`: how this socket is counted, and for the kernel half in the bits above
    /// [`Connection::CLASS`] when it entered ESTABLISHED.
    pub class: u16,
    /// The generation of the slot when the listener claimed it.
    pub generation: u32,
}

impl Connection {
    /// A listener, or a socket that is not in ESTABLISHED.
    pub const UNCOUNTED: u16 = 0;
    /// In ESTABLISHED, counted against the quota.
    pub const COUNTED: u16 = 1;
    /// In ESTABLISHED, exempt.
    pub const EXEMPT: u16 = 2;
    /// Taken over from another data plane: the daemon counts it.
    pub const INHERITED: u16 = 3;
    /// The bits that say how it is counted.
    pub const CLASS: u16 = 0xf;
    const CLASS_BITS: u32 = Self::CLASS.count_ones();
    /// What the bits above them hold at most.
    const MOST_TIME: u16 = u16::MAX >> Self::CLASS_BITS;
    /// Bits of a tick that are too fine for the time that a connection keeps.
    const TOO_FINE: u32 = 7;

    /// How this socket is counted.
    #[inline(always)]
    pub const fn class(&self) -> u16 {
        self.class & Self::CLASS
    }

    /// Says how this socket is counted, and that it has just entered ESTABLISHED.
    #[inline(always)]
    pub const fn enter(&mut self, class: u16, now: u64) {
        self.class = ((now >> Self::TOO_FINE) as u16) << Self::CLASS_BITS | class;
    }

    /// For how many ticks it has been established: up to 134 ms more or less, and for one that is
    /// older than nine minutes what is left of as many nine minutes as there are.
    #[inline(always)]
    pub const fn age(&self, now: u64) -> u64 {
        let entered = self.class >> Self::CLASS_BITS;
        let age = ((now >> Self::TOO_FINE) as u16).wrapping_sub(entered);
        ((age & Self::MOST_TIME) as u64) << Self::TOO_FINE
    }

    /// The backend that it names.
    #[inline(always)]
    pub const fn id(&self) -> BackendId {
        BackendId {
            slot: self.slot as u32,
            generation: self.generation,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_connection_keeps_how_it_is_counted_and_about_when_it_came(
            class in 0..4_u16, entered in 0..1_u64 << 44, age in 0..500_000_u64,
        ) {
            let mut connection = Connection { slot: 1, class: 0, generation: 2 };
            connection.enter(class, entered);
            prop_assert_eq!(connection.class(), class);
            prop_assert!(connection.age(entered + age).abs_diff(age) < 1 << Connection::TOO_FINE);
            prop_assert_eq!((connection.slot, connection.generation), (1, 2));
        }
    }
}
