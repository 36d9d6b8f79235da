//! The choice among the endpoints of a group, from counts of other nodes that are seconds old.
//!
//! Water level: `EndpointGroup::level` is the load up to which the connections still to come would
//! fill the endpoints. Each endpoint gets them in proportion to its room below that level. The node
//! draws by its rank and the number of the draw, not by lot, so that nodes which know the same do
//! not all choose the same. It takes two walks over the endpoints: [`Sum`] adds the rooms up, and
//! [`Draw`] finds whose room the draw falls into.

use crate::abi::EndpointGroup;

/// What one endpoint looks like to the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Connections that this node has placed on it, with those in flight.
    pub own: u64,
    /// Connections that others have placed on it, as far as is known.
    pub others: u64,
    /// Its share beside the others'; 0 gets none.
    pub weight: u64,
    /// Connects to it have failed of late.
    pub avoided: bool,
}

impl Seen {
    /// Its load, in units of [`EndpointGroup::LOAD_ONE`].
    #[inline(always)]
    pub const fn load(&self) -> u64 {
        // The division of an unsigned number by 0 is 0 in BPF, but a panic here.
        let weight = if self.weight == 0 { 1 } else { self.weight };
        self.own
            .wrapping_add(self.others)
            .wrapping_mul(EndpointGroup::LOAD_ONE)
            / weight
    }

    /// Its room below a level, in 256ths of a connection.
    #[inline(always)]
    const fn room(&self, level: u64) -> u64 {
        let load = self.load();
        if level <= load {
            return 0;
        }
        let room = (level - load).wrapping_mul(self.weight) >> 8;
        if room > MOST_ROOM { MOST_ROOM } else { room }
    }
}

/// Most room of one endpoint: 256 of them fit into 32 bits.
const MOST_ROOM: u64 = (1 << 24) - 1;
/// 2³² / golden ratio: multiples of it fill the circle evenly, however many there are.
const GOLDEN: u64 = 0x9E37_79B9;

/// The first walk: the rooms, and the least loaded endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Room of those that are not avoided.
    room: u64,
    /// Room of all.
    room_of_all: u64,
    /// Endpoints that are not avoided.
    sound: u32,
    /// Endpoints that may be chosen.
    all: u32,
}

impl Sum {
    /// Before the first endpoint.
    pub const EMPTY: Self = Self {
        room: 0,
        room_of_all: 0,
        sound: 0,
        all: 0,
    };

    /// Takes one endpoint into account.
    #[inline(always)]
    pub const fn add(&mut self, level: u64, seen: &Seen) {
        if seen.weight == 0 {
            return;
        }
        let room = seen.room(level);
        self.all += 1;
        self.room_of_all += room;
        if !seen.avoided {
            self.sound += 1;
            self.room += room;
        }
    }

    /// Whether every endpoint that may be chosen is avoided, so that none is.
    #[inline(always)]
    pub const fn are_all_avoided(&self) -> bool {
        self.sound == 0 && self.all != 0
    }
}

/// The second walk: whose room the draw falls into. Without room anywhere, the least loaded one;
/// among equals the turn goes round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    level: u64,
    /// Room that is still to be passed over.
    left: u64,
    /// Whether avoided endpoints may be chosen.
    avoided_too: bool,
    /// Whether there is room to draw from.
    by_room: bool,
    /// Endpoints that may be chosen.
    count: u32,
    /// The rank of the next endpoint, counted from where ties begin.
    turn: u32,
    /// The least load seen, and the rank of who has it.
    least: u64,
    best_turn: u32,
    chosen: u32,
}

impl Draw {
    const NOBODY: u32 = u32::MAX;

    /// The draw of that number of a node whose draws begin at `start` (a fraction of 2³²).
    #[inline(always)]
    pub const fn new(sum: &Sum, level: u64, start: u64, draws: u64) -> Self {
        let avoided_too = sum.sound == 0;
        let (room, count) = if avoided_too {
            (sum.room_of_all, sum.all)
        } else {
            (sum.room, sum.sound)
        };
        let at = start.wrapping_add(draws.wrapping_mul(GOLDEN)) & 0xffff_ffff;
        Self {
            level,
            left: (at * room) >> 32,
            avoided_too,
            by_room: room != 0,
            // Who comes first among equals: this many places before the first endpoint.
            count,
            turn: count - ((at * count as u64) >> 32) as u32,
            least: u64::MAX,
            best_turn: u32::MAX,
            chosen: Self::NOBODY,
        }
    }

    /// Looks at one endpoint, in the same order as [`Sum`] did.
    #[inline(always)]
    pub const fn look(&mut self, endpoint: u32, seen: &Seen) {
        if seen.weight == 0 || (seen.avoided && !self.avoided_too) {
            return;
        }
        if self.by_room {
            self.look_for_room(endpoint, seen.room(self.level));
        } else {
            self.look_for_least(endpoint, seen.load());
        }
    }

    #[inline(always)]
    const fn look_for_room(&mut self, endpoint: u32, room: u64) {
        // What filled up since the first walk leaves the draw beyond the last one: that one then.
        if room == 0 || self.best_turn == 0 {
            return;
        }
        self.chosen = endpoint;
        if self.left < room {
            self.best_turn = 0;
        } else {
            self.left -= room;
        }
    }

    #[inline(always)]
    const fn look_for_least(&mut self, endpoint: u32, load: u64) {
        let turn = if self.turn >= self.count {
            self.turn - self.count
        } else {
            self.turn
        };
        self.turn += 1;
        if load < self.least || (load == self.least && turn < self.best_turn) {
            (self.least, self.best_turn, self.chosen) = (load, turn, endpoint);
        }
    }

    /// Who has it; `None`: nobody may be chosen.
    #[inline(always)]
    pub const fn chosen(&self) -> Option<u32> {
        if self.chosen == Self::NOBODY {
            None
        } else {
            Some(self.chosen)
        }
    }
}
