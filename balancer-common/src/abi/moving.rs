//! Connections that are moved: what is noted at each one's socket, and for each backend.

/// In the storage of a connection that the daemon moves: what the kernel half should do with the
/// messages of its server, and what it has seen. The daemon writes it whole before it puts the
/// socket into the map of `goaway`; from then on the kernel half does, under the socket's lock.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MovingSocket {
    /// The GOAWAY is to be written before the next message that begins and ends between frames;
    /// otherwise messages are only looked at.
    pub tell: u32,
    /// 1: the client was told with a GOAWAY.
    pub told: u32,
    /// Messages seen.
    pub messages: u32,
    /// Messages that were whole frames.
    pub whole: u32,
    /// Messages that were whole frames, without another one since.
    pub streak: u32,
    /// Bytes of the last frame that are still to come.
    pub rest: u32,
}

/// For each slot: what has become of connections that were moved. Only the daemon writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotMoves {
    /// The generation of the backend that the other words are about.
    pub generation: u64,
    /// Connections that have left.
    pub left: u64,
    /// How many of them are on their way | those that stay << 32.
    pub others: u64,
}

impl SlotMoves {
    /// Packs the last word.
    pub const fn others(under_way: u32, stay: u32) -> u64 {
        under_way as u64 | (stay as u64) << 32
    }

    /// Connections that are on their way.
    pub const fn under_way(self) -> u32 {
        self.others as u32
    }

    /// Connections that were left where they are, each time that one was.
    pub const fn stay(self) -> u32 {
        (self.others >> 32) as u32
    }
}
